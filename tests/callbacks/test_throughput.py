"""Tokens per second with a clock that the test turns."""

from types import SimpleNamespace

import pytest
import torch

from rlhf_lightning.callbacks import Throughput
from rlhf_lightning.callbacks.throughput import num_real_tokens
from rlhf_lightning.core.batches import PairBatch, PromptBatch, TokenBatch


class Log:
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def log_metrics(self, metrics, step) -> None:
        self.logged |= metrics


def batch(*lengths: int) -> TokenBatch:
    real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    return TokenBatch(real.long(), real, real, real.long())


def test_rollouts_and_validation_are_not_training_time():
    log = Log()
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=2, loggers=[log])
    callback, now = Throughput(), [0.0]
    callback._clock = lambda: now[0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    callback.on_train_start(trainer, None)
    passes(1.0)  # training
    callback.on_rollout_start(trainer, None)
    passes(50.0)
    for rows in (3, 1):  # drawn in two goes, of which only a part is trained on
        callback.on_rollout_scored(trainer, None, SimpleNamespace(mask=torch.ones(rows, 25)), None)
    callback.on_rollout_end(trainer, None, SimpleNamespace(mask=torch.ones(2, 25)))
    assert log.logged == {"throughput/rollout_tokens_per_s": pytest.approx(2 * 100 / 50)}
    passes(1.0)  # training
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, None, None, batch(3, 2), 0)
    passes(0.5)  # still training
    callback.on_validation_start(trainer, None)
    passes(9.0)
    callback.on_validation_end(trainer, None)
    passes(3.0)  # training
    trainer.global_step = 2
    callback.on_train_batch_end(trainer, None, None, batch(5), 1)
    assert log.logged["throughput/train_tokens_per_s"] == pytest.approx(2 * (5 + 5) / 5.5)


def test_work_that_is_queued_on_the_device_takes_its_time(monkeypatch):
    """Reading the count waits for it."""
    log, now = Log(), [0.0]

    class Queued:
        def __add__(self, other):
            return self

        def __float__(self):
            now[0] += 3.0
            return 40.0

    trainer = SimpleNamespace(global_step=1, log_every_n_steps=2, world_size=1, loggers=[log])
    callback = Throughput()
    callback._clock = lambda: now[0]
    monkeypatch.setattr("rlhf_lightning.callbacks.throughput.num_real_tokens", lambda batch: Queued())
    callback.on_train_start(trainer, None)
    for step in (1, 2):
        now[0] += 0.5
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert log.logged == {"throughput/train_tokens_per_s": pytest.approx(40 / 4)}


def test_padding_is_no_token():
    assert int(num_real_tokens(batch(3, 1))) == 4
    assert int(num_real_tokens(PairBatch(batch(3, 1), batch(2, 2)))) == 8
    assert int(num_real_tokens(PairBatch(batch(3, 1), batch(2, 2), gold=batch(5, 4)))) == 17
    assert num_real_tokens({"x": 1}) is None
    prompts = PromptBatch(torch.ones(1, 1).long(), torch.ones(1, 1).bool(), ["a"], [{}], torch.zeros(1).long())
    assert num_real_tokens(prompts) is None
