import torch
from transformers import AutoTokenizer

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.rollout.samples import decode_samples


def test_answers_are_what_the_whole_text_has_beyond_the_prompt(tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    the, film, was, good = tokenizer.convert_tokens_to_ids(["the", "film", "was", "good"])
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = PromptBatch(
        tokens=torch.tensor([[bos, the, film], [pad, bos, was]]),
        attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]).bool(),
        texts=["the film", "was"],
        records=[{"n": 1}, {"n": 2}],
        indices=torch.tensor([0, 1]),
    )
    tokens = torch.tensor([[bos, the, film, was, good], [bos, the, film, eos, pad], [pad, bos, was, good, eos]])
    tokens = torch.cat((tokens, tokens[2:]))  # two answers to each prompt
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    mask = real.clone()
    mask[:, :3] = False
    answers = Generated(
        tokens=tokens,
        attention_mask=real,
        mask=mask,
        positions=(real.long().cumsum(-1) - 1).clamp(min=0),
        finished=torch.tensor([False, True, True, True]),
    )
    samples = decode_samples(tokenizer, prompts, answers)
    # this tokenizer drops the space in front of an answer that is decoded alone
    assert [(s.prompt, s.completion) for s in samples] == [
        ("the film", " was good"),
        ("the film", ""),
        ("was", " good"),
        ("was", " good"),
    ]
    assert [s.record["n"] for s in samples] == [1, 1, 2, 2]
    assert [s.finished for s in samples] == [False, True, True, True]
    assert samples[1].tokens == (eos,)
