"""A prompt computed once for all of its answers: the same hidden states and gradients, in every family that can."""

import pytest
import torch

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.models.shared_prompts import group_states, pair_states, why_no_cache
from rlhf_lightning.models.spec import LoraSpec

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums over at most 48 numbers of size 1


def answered(lab, *, order=(5, 0, 3, 1, 4, 2, 6)) -> TokenBatch:
    """Three prompts with 3, 3 and 1 answers, in any order; sliding windows (3) are shorter than most of them."""
    prompts = lab.padded(lab.records(7, 4, 1), "left", extra=1)
    answers = lab.padded(lab.records(5, 2, 6, 1, 4, 6, 3, seed=1))
    asked = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    real = torch.cat((prompts.attention_mask[asked], answers.attention_mask), dim=1)
    mask = torch.cat((torch.zeros_like(prompts.attention_mask[asked]), answers.attention_mask), dim=1)
    tokens = torch.cat((prompts.tokens[asked], answers.tokens), dim=1)
    rows = torch.tensor(order)
    return TokenBatch(tokens[rows], real[rows], mask[rows], (real.long().cumsum(-1) - 1).clamp(min=0)[rows])


def paired(lab, side, *, starts=(4, 2, 3), ends=((3, 6, 1), (5, 2, 4))) -> TokenBatch:
    """Three pairs: prompts of 4, 2 and 3 tokens, answers of uneven lengths, the preferred ones first."""
    prompts = lab.records(*starts, seed=1)
    rows = [
        torch.cat(row)
        for seed, some in enumerate(ends)
        for row in zip(prompts, lab.records(*some, seed=2 + seed), strict=True)
    ]
    batch = lab.padded(rows, side, extra=2)
    asked = torch.tensor(starts).repeat(2)[:, None]
    return TokenBatch(
        batch.tokens, batch.attention_mask, batch.attention_mask & (batch.positions >= asked), batch.positions
    )


def in_pairs(policy, batch):
    return pair_states(policy.body, batch.tokens, batch.attention_mask, batch.mask)


def states(policy, batch):
    return policy.hidden_states(batch.tokens, batch.attention_mask, batch.positions)


def shared(policy, batch):
    return group_states(policy.body, batch.tokens, batch.attention_mask, batch.positions, batch.mask)


def numbers_of_rows(policy) -> list[int]:
    """Rows of each of the decoder's passes from now on."""
    seen: list[int] = []
    policy.body.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2, dropout=0.0)], ids=["weights", "adapter"])
def test_hidden_states_and_gradients_are_those_of_each_row_alone(lab, family, lora):
    policy, batch = lab.policy(family, lora=lora), answered(lab)
    if lora is not None:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
    once, apart = shared(policy, batch), states(policy, batch)
    torch.testing.assert_close(once[batch.attention_mask], apart[batch.attention_mask], **EXACT)
    weights = torch.linspace(-1, 1, apart[batch.mask].numel()).view(-1, apart.shape[-1])
    trained = [p for p in policy.body.parameters() if p.requires_grad]
    ours = torch.autograd.grad((weights * once[batch.mask]).sum(), trained)
    theirs = torch.autograd.grad((weights * apart[batch.mask]).sum(), trained)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("side", ["right", "left"])
def test_pairs_have_the_hidden_states_and_gradients_of_each_row_alone(lab, family, side):
    policy, batch = lab.policy(family), paired(lab, side)
    once, apart = in_pairs(policy, batch), states(policy, batch)
    real = batch.attention_mask
    torch.testing.assert_close(once[real], apart[real], **EXACT)
    weights = torch.linspace(-1, 1, apart[real].numel()).view(-1, apart.shape[-1])
    parameters = list(policy.body.parameters())
    ours = torch.autograd.grad((weights * once[real]).sum(), parameters)
    theirs = torch.autograd.grad((weights * apart[real]).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_of_pairs_each_prompt_is_read_once(lab):
    policy, batch = lab.policy("llama"), paired(lab, "right")
    shapes = []
    policy.body.register_forward_pre_hook(lambda m, a, k: shapes.append((*k["input_ids"].shape,)), with_kwargs=True)
    policy.shared_prompt_states(batch.tokens, batch.attention_mask, batch.positions, batch.mask)
    assert shapes == [(3, 4), (6, 6)], "12 + 36 tokens, where padded rows have 6 x 10"


@pytest.mark.parametrize(
    "given",
    [
        {"starts": (9, 1, 1), "ends": ((1, 9, 9), (1, 9, 9))},  # prompts 9 wide and answers too: 9 + 2 x 9 > 2 x 12
        {"starts": (4, 2, 3), "ends": ((0, 0, 0), (0, 0, 0))},
    ],
    ids=["no fewer tokens", "no answers"],
)
def test_pairs_that_gain_nothing_are_computed_row_by_row(lab, given):
    policy = lab.policy("llama")
    batch = paired(lab, "right", **given)
    assert in_pairs(policy, batch) is None
    hidden = policy.shared_prompt_states(batch.tokens, batch.attention_mask, batch.positions, batch.mask)
    torch.testing.assert_close(hidden[batch.attention_mask], states(policy, batch)[batch.attention_mask], **EXACT)


def test_pairs_of_unlike_prompts_are_computed_row_by_row(lab):
    policy, batch = lab.policy("llama"), paired(lab, "right")
    batch.tokens[4, 1] = (batch.tokens[4, 1] + 1) % lab.vocab
    assert in_pairs(policy, batch) is None
    batch = paired(lab, "right")
    batch.mask[1, 2] = False  # its completion begins later than that of the row beside it
    assert in_pairs(policy, batch) is None


def test_log_probabilities_are_the_same_and_each_prompt_is_read_once(lab):
    policy, batch = lab.policy("qwen2"), answered(lab)
    apart = policy(batch, with_entropy=True)
    seen = numbers_of_rows(policy)
    once = policy(batch, with_entropy=True, answers=batch.mask)
    assert seen == [3, 7]
    torch.testing.assert_close(once.logprobs, apart.logprobs, **EXACT)
    torch.testing.assert_close(once.entropy, apart.entropy, **EXACT)


def test_words_put_into_an_answers_mouth_are_part_of_its_prompt(lab):
    """A prefix is read and carries no loss; rows with different ones share nothing of it."""
    policy, batch = lab.policy("llama"), answered(lab)
    batch.mask[:, : int(batch.mask.any(0).int().argmax()) + 2] = False
    assert shared(policy, batch) is None, "behind two tokens of their own all rows differ"
    torch.testing.assert_close(policy(batch, answers=batch.mask).logprobs, policy(batch).logprobs, **EXACT)


def test_rows_that_share_little_are_computed_one_by_one(lab):
    policy, batch = lab.policy("llama"), answered(lab, order=(0, 1, 3, 6))
    assert shared(policy, batch) is None, "three prompts of four rows"
    assert shared(policy, answered(lab, order=(0,))) is None
    batch.mask[:] = False
    assert shared(policy, batch) is None


@pytest.mark.parametrize(
    ("options", "training", "shares"),
    [
        ({"gradient_checkpointing": True}, True, False),
        ({"gradient_checkpointing": True}, False, True),
        ({"disable_dropout": False}, True, False),
        ({"disable_dropout": False}, False, True),
        ({"lora": LoraSpec(r=2, dropout=0.5)}, True, False),
        ({"lora": LoraSpec(r=2, dropout=0.5)}, False, True),
    ],
)
def test_what_keeps_no_cache_or_draws_noise_is_computed_row_by_row(lab, options, training, shares):
    policy = lab.policy("llama", **options).train(training)
    assert (shared(policy, answered(lab)) is not None) is shares


def test_compiled_layers_are_left_alone(lab):
    policy = lab.policy("llama")
    policy.body.layers[0].compile(backend="eager")
    assert shared(policy, answered(lab)) is None


def test_a_recurrent_model_is_left_alone(lab):
    lab.configs["mamba"] = {"vocab_size": lab.vocab, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    try:
        policy = lab.policy("mamba")
    finally:
        del lab.configs["mamba"]
    assert "takes no" in why_no_cache(policy.body)
    assert shared(policy, answered(lab)) is None
