import random

import pytest
from transformers import AutoTokenizer

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.encode import encode_pair, encode_prompt
from rlhf_lightning.pipelines.files import read_jsonl
from rlhf_lightning.quickstart import material as material_module
from rlhf_lightning.quickstart.language import is_grammatical, sample_review
from rlhf_lightning.quickstart.material import MakeReviews, scramble, train_tokenizer


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    job = MakeReviews(str(folder), num_reviews=1500, num_demonstrations=200, num_prompts=200, num_val=50, seed=3)
    return folder, job.run(), job


def test_files_hold_what_was_asked_for(material):
    folder, figures, _ = material
    for name, count in {"corpus": 1500, "corpus_val": 50, "sft": 200, "sft_val": 50, "prompts": 200}.items():
        assert len(read_jsonl(folder / f"{name}.jsonl")) == count == figures[f"num_{name}"]
    damaged = [not is_grammatical(record["text"]) for record in read_jsonl(folder / "corpus.jsonl")]
    assert sum(damaged) / 1500 == pytest.approx(0.3, abs=0.04)
    for record in read_jsonl(folder / "sft.jsonl"):
        assert is_grammatical(record["prompt"] + record["completion"])


def test_validation_prompts_are_held_out(material):
    folder, *_ = material
    prompts = {name: {r["prompt"] for r in read_jsonl(folder / f"{name}.jsonl")} for name in ("prompts", "prompts_val")}
    assert len(prompts["prompts"]) == 200
    assert len(prompts["prompts_val"]) == 50
    assert not prompts["prompts"] & prompts["prompts_val"]
    assert {r["prompt"] for r in read_jsonl(folder / "sft.jsonl")} <= prompts["prompts"]
    assert {r["prompt"] for r in read_jsonl(folder / "sft_val.jsonl")} <= prompts["prompts_val"]


def test_the_seed_names_the_draws(material, tmp_path):
    folder, _, job = material
    files = [f"{name}.jsonl" for name in ("corpus", "sft", "prompts")] + ["tokenizer/tokenizer.json"]
    MakeReviews(**{**vars(job), "out_dir": str(tmp_path / "again")}).run()
    assert all((tmp_path / "again" / file).read_text() == (folder / file).read_text() for file in files)
    MakeReviews(**{**vars(job), "out_dir": str(tmp_path / "other"), "seed": 4}).run()
    assert (tmp_path / "other" / "sft.jsonl").read_text() != (folder / "sft.jsonl").read_text()


def test_the_tokenizer_reads_words_and_gives_them_back(material):
    folder, figures, _ = material
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert len(tokenizer) == figures["vocab"] < 320
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<bos>", "<eos>", "<pad>", "<unk>")
    assert len(set(tokenizer.convert_tokens_to_ids(list(special)))) == 4
    for record in read_jsonl(folder / "sft_val.jsonl"):
        encoded = encode_pair(tokenizer, record["prompt"], record["completion"], add_eos=True)
        text = record["prompt"] + record["completion"]
        assert tokenizer.decode(encoded.ids) == f"<bos>{text}<eos>"
        assert tokenizer.unk_token_id not in encoded.ids
        # one token a word or mark, and prompt and completion do not run into each other
        assert len(encoded.ids) == 2 + len(text.replace(".", " .").replace(",", " ,").split())
        assert encoded.ids[: encoded.mask.index(True)] == encode_prompt(tokenizer, record["prompt"])


def test_unknown_words_are_unknown_tokens():
    tokenizer = train_tokenizer(["The film was good."] * 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("The zebra was good!")["input_ids"]) == [
        "<bos>",
        "The",
        "<unk>",
        " was",
        " good",
        "<unk>",
    ]


def test_scrambled_reviews_are_seldom_grammatical():
    rng = random.Random(0)
    assert sum(is_grammatical(scramble(sample_review(rng), rng)) for _ in range(500)) < 25


def test_mistakes_are_explained(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="scrambled_frac"):
        MakeReviews(str(tmp_path), scrambled_frac=1.5).run()
    monkeypatch.setattr(material_module, "sample_review", lambda rng: "The film was good. I would watch it again.")
    with pytest.raises(UserError, match="few more than 2 prompts; use less"):
        MakeReviews(str(tmp_path), num_prompts=20, num_val=10).run()
