"""The same prompts before and after."""

import json

import pytest
import torch

from rlhf_lightning.callbacks import LastCheckpoint, SampleLogger
from rlhf_lightning.callbacks.sample_logger import _prompt_of
from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.errors import UserError


def read(folder) -> list[dict]:
    return [json.loads(row) for row in (folder / "samples.jsonl").read_text().splitlines()]


def test_sft_is_asked_the_prompts_of_its_first_batch(sft, trainer_of, tmp_path, capsys):
    trainer_of(SampleLogger(max_new_tokens=5)).fit(*sft)
    rows = read(tmp_path)
    assert [row["prompt"] for row in rows] == ["the good film", "the bad film"]
    assert {row["step"] for row in rows} == {2}
    assert all(row["score_after"] is None for row in rows)
    assert any(row["before"] != row["after"] for row in rows)  # lr 0.1 moves the tiny model
    assert "before: " in capsys.readouterr().out


def test_before_is_what_the_untrained_model_says(sft, trainer_of, tmp_path):
    module, data = sft
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    trainer_of(SampleLogger(max_new_tokens=5, show=False)).fit(module, data)
    assert all(row["before"] == row["after"] for row in read(tmp_path))


def test_ppo_rows_have_scores_by_its_own_reward(ppo, trainer_of, tmp_path):
    trainer_of(SampleLogger(num_prompts=2, every_n_steps=2, show=False)).fit(*ppo)
    rows = read(tmp_path)
    assert [row["prompt"] for row in rows] == ["the film", "a plot"] * 2
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    for row in rows:
        assert row["score_before"] == len(row["before"].split())
        assert row["score_after"] == len(row["after"].split())


def test_a_resumed_run_keeps_the_first_answers_and_drops_later_rows(sft, trainer_of, tmp_path):
    module, data = sft
    trainer_of(SampleLogger(show=False), LastCheckpoint()).fit(module, data)
    first = read(tmp_path)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps({**first[0], "step": 99}) + "\n")
    trainer = trainer_of(SampleLogger(show=False), LastCheckpoint(), max_epochs=2)
    trainer.fit(module, data, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    assert [row["before"] for row in rows[2:]] == [row["before"] for row in first]


def test_the_prompt_of_a_row_ends_where_training_begins():
    tokens = torch.arange(10, 18)[None]
    mask = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1]]).bool()
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2]])
    real = torch.ones_like(mask)
    assert _prompt_of(TokenBatch(tokens, real, mask, tokens, segments), 0) == [10, 11, 12]
    plain = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]).bool()
    assert _prompt_of(TokenBatch(tokens, real, plain, tokens), 0) == tokens[0].tolist()


def test_no_prompts_is_an_error():
    with pytest.raises(UserError, match="num_prompts=0"):
        SampleLogger(num_prompts=0)
