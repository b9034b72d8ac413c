"""Records of any shape: read, or refused by an error of ours that names file and place; nothing else ever comes out.

RLHF_FUZZ=1250 pytest tests/security/test_fuzzed_records.py      # `make fuzz`: 1250 files for each of eight formats
"""

import gzip
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import BatchFormat
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.readers import Source, read_source

NUM = int(os.environ.get("RLHF_FUZZ", "40"))
FUZZ = settings(
    max_examples=NUM, deadline=None, derandomize=NUM <= 100, suppress_health_check=list(HealthCheck), database=None
)

WORDS = st.sampled_from(
    ["the film", "good", "", " ", "\u0000", "\ud800", "\u2028", "<eos>", "[[", "{% x %}", "é" * 3, "a" * 3000]
)
TEXTS = WORDS | st.text(max_size=12)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1e308, 10**30])
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "", "User"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES | ANY, "content": TEXTS | ANY}, optional={"tool_calls": ANY}) | ANY, max_size=4
)
COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": TEXTS | MESSAGES,
    "completion": TEXTS | MESSAGES,
    "chosen": TEXTS | MESSAGES,
    "rejected": TEXTS | MESSAGES,
    "messages": MESSAGES,
    "text": TEXTS,
    "label": st.booleans() | ANY,
    "rating": NUMBERS,
    "margin": NUMBERS,
    "completions": st.lists(TEXTS, max_size=3),
    "ranks": st.lists(NUMBERS, max_size=3),
    "labels": st.lists(st.booleans() | ANY, max_size=3),
}
RECORDS = st.fixed_dictionaries({}, optional={name: values | ANY for name, values in COLUMNS.items()}) | ANY

GOOD: dict[BatchFormat, dict[str, Any]] = {
    "tokens": {"prompt": "the film", "completion": "good"},
    "pairs": {"prompt": "the film", "chosen": "good", "rejected": "bad"},
    "ranked": {"prompt": "the film", "completions": ["good", "bad"], "ranks": [1, 2]},
    "rated": {"prompt": "the film", "completion": "good", "rating": 0.5},
    "unpaired": {"prompt": "the film", "completion": "good", "label": True},
    "mismatched": {"prompt": "the film", "completion": "good", "label": True},
    "steps": {"prompt": "the film", "completions": ["good", "bad"], "labels": [True, False]},
    "prompts": {"prompt": "the film"},
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def dumped(rows: list[Any]) -> bytes:
    lines = [json.dumps(row, ensure_ascii=True) for row in rows]
    return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer) -> PreTrainedTokenizerBase:
    """With a chat template, so that conversations get as far as plain texts do."""
    found = AutoTokenizer.from_pretrained(tiny_tokenizer)
    found.chat_template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    return found


def refusal(read: Callable[[], Any], otherwise: str) -> str:
    """What is said where records are refused; `otherwise` where they are read. No other error may come out."""
    try:
        read()
    except UserError as error:
        return str(error)
    return otherwise


def read_all(path: Path, tokenizer: PreTrainedTokenizerBase, batch_format: BatchFormat) -> None:
    """From the file to batches of tensors, as a stage reads it."""
    data = RLHFDataModule(str(path), batch_size=2, max_length=16).setup_for(batch_format, tokenizer)
    for batch in data.train_dataloader():
        assert batch is not None


@pytest.mark.parametrize("batch_format", get_args(BatchFormat))
def test_records_of_any_shape(folder, tokenizer, batch_format):
    @FUZZ
    @given(st.lists(RECORDS, min_size=1, max_size=3))
    def check(rows: list[Any]) -> None:
        path = folder / f"{batch_format}.jsonl"
        path.write_bytes(dumped(rows))
        assert path.name in refusal(lambda: read_all(path, tokenizer, batch_format), path.name)

    check()


@pytest.mark.parametrize("batch_format", sorted(GOOD))
def test_a_good_record_with_one_field_spoilt_is_named_by_its_line(folder, tokenizer, batch_format):
    @FUZZ
    @given(st.data())
    def check(data: st.DataObject) -> None:
        good = GOOD[batch_format]
        field = data.draw(st.sampled_from(sorted(good)))
        path = folder / f"{batch_format}_one.jsonl"
        path.write_bytes(dumped([good, good | {"prompt": "a plot"}, good | {field: data.draw(ANY)}]))
        place = f"{path.name}, line 3"
        assert re.search(rf"{place}\b", refusal(lambda: read_all(path, tokenizer, batch_format), place))

    check()


FILES = ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.jsonl.gz", "x.tsv"]


@pytest.mark.parametrize("name", FILES)
def test_bytes_of_any_kind(folder, name):
    start = {
        "jsonl": b'{"prompt": "a"}\n',
        "json": b'[{"prompt": "a"}]',
        "csv": b"prompt,x\na,b\n",
        "tsv": b"prompt\tx\n",
    }
    whole = start.get(name.split(".")[1], b"PAR1")
    few = settings(FUZZ, max_examples=NUM if "json" in name else max(NUM // 12, 10))  # `datasets` takes 20 ms a file

    @few
    @given(st.binary(max_size=64), st.binary(max_size=8), st.integers(0, 16))
    def check(noise: bytes, inside: bytes, at: int) -> None:
        for content in (noise, whole[:at] + inside + whole[at:], whole[:at]):
            path = folder / name
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") and len(noise) % 2 else content)
            assert name in refusal(lambda path=path: read_source(Source(str(path))), name)

    check()


def test_the_fuzz_finds_what_a_naive_reader_lets_through(folder):
    """A reader that trusts json and keys: the same records bring it down."""
    fallen: set[str] = set()

    @FUZZ
    @given(st.lists(RECORDS, min_size=1, max_size=3))
    def check(rows: list[Any]) -> None:
        try:
            for line in dumped(rows).decode().splitlines():
                row = json.loads(line)
                (row["prompt"] + row["completion"]).encode("utf-8")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            fallen.add(type(error).__name__)

    check()
    assert {"KeyError", "TypeError"} <= fallen
