from rich.console import Console

from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.encode import encode_pair
from rlhf_lightning.data.preview import preview_records, record_tokens
from rlhf_lightning.data.truncation import LengthRule


def test_every_token_is_shown_with_what_becomes_of_it(tokenizer):
    encoding = RLHFDataModule("a.jsonl").encoding_for("tokens", tokenizer)
    full = encode_pair(tokenizer, "qz", "jx", add_eos=True)  # pairs of letters that no merge joins
    prompt_length = full.mask.index(True)
    (kept,) = LengthRule(4).cut([full], prompt_length, bos_length=1)
    shown = record_tokens(encoding, full, kept, width=6)
    assert [(token.text, token.role) for token in shown] == [
        ("<s>", "prompt"),
        ("q", "truncated"),
        ("z", "truncated"),
        ("j", "trained"),
        ("x", "trained"),
        ("</s>", "end"),
        ("<pad>", "padding"),
        ("<pad>", "padding"),
    ]


def test_a_record_that_is_left_out_is_all_red(tokenizer):
    encoding = RLHFDataModule("a.jsonl").encoding_for("tokens", tokenizer)
    full = encode_pair(tokenizer, "q", "é", add_eos=True)
    shown = record_tokens(encoding, full, None)
    assert {token.role for token in shown} == {"truncated"}
    assert "".join(token.text for token in shown) == "<s>qé</s>", "a character of two tokens is shown once"


def render(*args, **options):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(preview_records(*args, **options))
    return console.export_text()


def test_preview_of_pairs_and_prompts(tokenizer, write):
    pairs = write([{"prompt": "What?", "chosen": " Paris.", "rejected": " Two.", "margin": 2}] * 3, "pairs.jsonl")
    text = render(RLHFDataModule(pairs), "pairs", 2, tokenizer=tokenizer)
    assert "pairs.jsonl, line 2" in text
    assert "pairs.jsonl, line 3" not in text
    assert "chosen, margin 2" in text
    assert "<s>What? Paris.</s>" in text
    assert "gold" not in text
    triples = write([{"prompt": "What?", "chosen": " Paris.", "rejected": " Two.", "gold": " Rome."}], "triples.jsonl")
    text = render(RLHFDataModule(triples), "triples", tokenizer=tokenizer)
    assert [name in text for name in ("chosen (", "rejected (", "gold (", "<s>What? Rome.</s>")] == [True] * 4
    same = write([{"prompt": "What?", "chosen": "a", "rejected": "a"}], "same.jsonl")
    assert "left out: chosen equals rejected" in render(RLHFDataModule(same), "pairs", tokenizer=tokenizer)
    prompts = write([{"prompt": "What is it?"}], "prompts.jsonl")
    assert "prompt (" in render(RLHFDataModule(prompts), "prompts", tokenizer=tokenizer)
