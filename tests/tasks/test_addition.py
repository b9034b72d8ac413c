import re

import pytest
from transformers import AutoTokenizer

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.pipelines.files import read_jsonl
from rlhf_lightning.tasks.addition import SUMS, MakeAddition


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("addition")
    job = MakeAddition(str(folder), num_demonstrations=4000, num_more=500, num_prompts=300, num_val=100, seed=2)
    return folder, job.run(), job


def right(record: dict) -> str:
    a, b = re.fullmatch(r"(\d\d)\+(\d\d)=", record["prompt"]).groups()
    return f"{int(a) + int(b):03d}"


def test_half_of_the_demonstrations_are_wrong_and_nothing_else_is(material):
    folder, *_ = material
    records = read_jsonl(folder / "sft.jsonl")
    assert len(records) == 4000
    # four standard deviations of a share of 4000 draws
    assert sum(r["completion"] != right(r) for r in records) / 4000 == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    assert all(int(record["completion"]) in SUMS for record in records)
    for name in ("prompts", "val"):
        assert all(record["answer"] == right(record) for record in read_jsonl(folder / f"{name}.jsonl"))


def test_sums_held_out_are_nowhere_else(material):
    folder, figures, _ = material
    names = ("sft", "more", "prompts", "val")
    asked = {name: [record["prompt"] for record in read_jsonl(folder / f"{name}.jsonl")] for name in names}
    assert len(set(asked["val"])) == figures["num_val"] == 100
    assert len(set(asked["prompts"])) == 300
    assert not set(asked["val"]) & {*asked["sft"], *asked["more"], *asked["prompts"]}
    assert asked["more"] != asked["sft"][:500]


def test_the_seed_names_the_draws(material, tmp_path):
    folder, _, job = material
    MakeAddition(**{**vars(job), "out_dir": str(tmp_path / "again")}).run()
    MakeAddition(**{**vars(job), "out_dir": str(tmp_path / "other"), "seed": 3}).run()
    assert (tmp_path / "again" / "sft.jsonl").read_text() == (folder / "sft.jsonl").read_text()
    assert (tmp_path / "other" / "sft.jsonl").read_text() != (folder / "sft.jsonl").read_text()


def test_a_token_per_character(material):
    folder, *_ = material
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer("47+85=132").input_ids
    assert len(ids) == 9
    assert tokenizer.decode(ids) == "47+85=132"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"wrong_frac": 1.0}, "wrong_frac=1.0: use a share of the demonstrations that leaves some right"),
        ({"num_prompts": 8000}, "num_prompts=8000 and num_val=512: there are 8100 sums of two two-digit numbers"),
    ],
)
def test_what_cannot_be_made_is_an_error(options, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        MakeAddition(str(tmp_path), **options).run()
