"""Tiny tokenizers, trained here in milliseconds: byte-level ones, and such that put a space in front of a text."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is the capital of France? Paris. How many people live there? About two million.",
    "user assistant system model USER: ASSISTANT: ### Instruction: ### Response: [INST] [/INST]",
    "The quick brown fox jumps over the lazy dog. Be brief. Once upon a time there was a girl.",
]

CONTROLS = {  # bos, eos, further control tokens of each family
    "chatml": (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "llama2": ("<s>", "</s>", []),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "zephyr": ("<s>", "</s>", []),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "phi3": ("<s>", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "vicuna": ("<s>", "</s>", []),
    "alpaca": ("<s>", "</s>", []),
    "no_prefix": (None, "<|im_end|>", ["<|im_start|>"]),
}


def build_tokenizer(family=None, kind="bytelevel", adds_bos=True):
    bos, eos, others = CONTROLS[family] if family else ("<s>", "</s>", [])
    specials = ["<unk>", "<pad>", *(token for token in (bos, eos) if token), *others]
    if kind == "bytelevel":
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
        )
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials + alphabet)
        core.train_from_iterator(TEXTS, trainer)
        state = json.loads(core.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in alphabet]
        core = Tokenizer.from_str(json.dumps(state))
    if bos and adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<pad>", unk_token="<unk>"
    )
    if others:
        tokenizer.add_special_tokens({"additional_special_tokens": others})
    if family:
        tokenizer.chat_template = (Path(__file__).parent / "chat_templates" / f"{family}.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer():
    made = {}

    def make(family=None, kind="bytelevel"):
        if (family, kind) not in made:
            made[family, kind] = build_tokenizer(family, kind)
        return made[family, kind]

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes records as JSONL and gives the path."""

    def write_file(records, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return str(path)

    return write_file
