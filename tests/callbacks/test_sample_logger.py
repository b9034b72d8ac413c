"""The same prompts before and after."""

import json
import math

import pytest
import torch

from rlhf_lightning.callbacks import LastCheckpoint, SampleLogger
from rlhf_lightning.callbacks.sample_logger import _prompt_of
from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn
from rlhf_lightning.rewards.combine import WeightedReward


def read(folder, *, completions: bool = False) -> list[dict]:
    """The rows of before and after, or those of the rollouts."""
    rows = [json.loads(row) for row in (folder / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if ("completion" in row) == completions]


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


class Verifier(RewardFn):
    """Needs a column; cannot score one prompt's answers; says what is behind a score."""

    def __call__(self, samples):
        keys = [float(sample.record["key"]) for sample in samples]
        return DetailedScores([k if k else math.nan for k in keys], {"words": [float(len(s.tokens)) for s in samples]})


def verified(ppo, tmp_path) -> tuple:
    module, data = ppo
    rows = [{"prompt": p, "key": k} for p, k in (("the film", 2), ("a plot", 0), ("the end", 3))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module.rewards = [WeightedReward(Verifier(), weight=0.5, name="check", on_error="drop")]
    return module, data


def test_every_answer_of_every_rollout_is_written_with_all_that_was_said_about_it(ppo, trainer_of, tmp_path):
    trainer_of(SampleLogger(show=False)).fit(*verified(ppo, tmp_path))
    rows = read(tmp_path, completions=True)
    assert [(row["prompt"], row["rollout"], row["step"]) for row in rows] == [
        ("the film", 0, 0),
        ("a plot", 0, 0),
        ("the end", 1, 2),
    ]
    assert [row["valid"] for row in rows] == [True, False, True]
    assert [row["score"] for row in rows] == [1.0, 0.0, 1.5]
    assert [row["breakdown"]["check"] for row in rows] == [2, 0, 3]
    assert all(row["breakdown"]["check/words"] > 0 for row in rows if row["valid"])
    # a verifier finds its key again at the end; the dropped prompt was not chosen
    (before_and_after,) = read(tmp_path)
    assert before_and_after["prompt"] == "the film"
    assert before_and_after["score_before"] == before_and_after["score_after"] == 1.0
    assert before_and_after["breakdown_after"]["check"] == before_and_after["breakdown_before"]["check"] == 2


def test_rollouts_can_be_left_out(ppo, trainer_of, tmp_path):
    trainer_of(SampleLogger(show=False, rollouts=False)).fit(*ppo)
    assert read(tmp_path, completions=True) == []
    assert len(read(tmp_path)) == 2


def test_a_resumed_run_writes_no_rollout_twice(ppo, trainer_of, tmp_path):
    trainer = trainer_of(SampleLogger(show=False), LastCheckpoint(), max_epochs=1)
    trainer.fit(*ppo)
    path = tmp_path / "samples.jsonl"
    with path.open("a") as file:  # a rollout begun after the checkpoint, at its very step
        row = read(tmp_path, completions=True)[-1]
        file.write(
            json.dumps(row | {"rollout": 2, "step": trainer.global_step, "completion": "to be sampled again"}) + "\n"
        )
    again = trainer_of(SampleLogger(show=False), LastCheckpoint(), max_epochs=2)
    again.fit(*ppo, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    rows = read(tmp_path, completions=True)
    assert [row["rollout"] for row in rows] == [0, 0, 1, 2, 2, 3]
    assert all(row["completion"] != "to be sampled again" for row in rows)


def test_half_a_row_that_a_kill_left_is_written_again(ppo, trainer_of, tmp_path):
    trainer_of(SampleLogger(show=False), LastCheckpoint(), max_epochs=1).fit(*ppo)
    path = tmp_path / "samples.jsonl"
    with path.open("ab") as file:
        file.write('{"step": 4, "prompt": "the endä'.encode()[:-1])  # within a character, even
    trainer_of(SampleLogger(show=False), LastCheckpoint(), max_epochs=2).fit(
        *ppo, ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    assert [row["rollout"] for row in read(tmp_path, completions=True)] == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("every", [None, 1])
def test_a_run_killed_at_its_very_end_has_its_last_answers_once(written, every, sft, trainer_of, tmp_path):
    checkpoint = lambda: LastCheckpoint(every_n_train_steps=every)  # noqa: E731
    trainer_of(SampleLogger(show=False), checkpoint()).fit(*sft)
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    if not written:
        path.unlink()
    trainer_of(SampleLogger(show=False), checkpoint()).fit(*sft, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert path.read_bytes() == whole


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
