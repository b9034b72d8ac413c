"""On real files, where there are some: `RLHF_DATA_DIR=<folder with data/ and models/> pytest tests/data`."""

import os
from pathlib import Path

import pytest

from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.encode import encode_pair, encode_prompt, encode_text
from rlhf_lightning.data.readers import Source
from rlhf_lightning.data.tokenizers import find_tokenizer

FOLDER = os.environ.get("RLHF_DATA_DIR")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="RLHF_DATA_DIR names no folder with data/ and models/")


@pytest.fixture(scope="module")
def stories():
    """A tokenizer with one token for beginning and end, byte fallback, and <unk> as padding."""
    return find_tokenizer(str(Path(FOLDER) / "models" / "stories260k"))


def test_beginning_end_and_byte_fallback(stories):
    assert stories.bos_token_id == stories.eos_token_id != stories.pad_token_id
    text = encode_text(stories, "Once 😀 é", add_eos=True)
    assert text.ids[0] == text.ids[-1] == stories.bos_token_id
    assert "<0xF0>" in stories.convert_ids_to_tokens(text.ids)
    assert stories.decode(text.ids, skip_special_tokens=True) == "Once 😀 é"
    assert encode_prompt(stories, "") == [stories.bos_token_id]
    pair = encode_pair(stories, "Lily was", " happy.", add_eos=True)
    assert list(pair.ids) == [*stories("Lily was happy.").input_ids, stories.eos_token_id]


def test_transcripts_of_preferences(stories):
    path = Path(FOLDER) / "data" / "hh-rlhf" / "train.jsonl"
    data = RLHFDataModule(str(path), val_frac=0.1, max_length=256).setup_for("pairs", stories)
    assert data.report("train").read + data.report("val").read == 1900
    for batch in data.val_dataloader():
        for side in (batch.chosen, batch.rejected):
            assert (side.tokens[:, 0] == stories.bos_token_id).all()
            assert side.mask.any(1).all()
            assert not side.mask[:, 0].any()


def test_a_directory_by_split_and_columns(stories):
    source = Source(
        str(Path(FOLDER) / "data" / "gsm8k"),
        split="test",
        columns={"prompt": "question", "completion": "answer"},
        limit=200,
    )
    data = RLHFDataModule(source, packing=True, max_length=512, overlong="drop").setup_for("tokens", stories)
    assert sum(batch.num_sequences for batch in data.train_dataloader()) == data.report().kept
