"""Tokens per second, of training and of rollouts, each over its own time."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlhf_lightning.core.batches import (
    AnswerRollouts,
    Generated,
    PairBatch,
    PairRollouts,
    RankedBatch,
    RatedBatch,
    Rollouts,
    StepBatch,
    TokenBatch,
    UnpairedBatch,
)


class Throughput(Callback):
    """Logs `throughput/train_tokens_per_s` and `throughput/rollout_tokens_per_s`, of all ranks together.

    A token is a real token of a batch (prompts included, padding not); a rollout's tokens are the sampled ones. Time
    between `on_rollout_start` and `on_rollout_end` is a rollout's and counts for nothing else; validation and
    checkpoints count for neither.
    """

    def __init__(self) -> None:
        self._clock = time.perf_counter
        self._reset_training()

    def _reset_training(self) -> None:
        self._train_tokens: Tensor | None = None
        self._train_seconds = 0.0
        self._since: float | None = None
        self._rollout_since: float | None = None
        self._sampled = 0.0

    # --- training: from the end of one batch to the end of the next, less rollouts

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset_training()
        self._since = self._clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = num_real_tokens(batch)
        if tokens is None or self._since is None:
            return
        # kept on the device: reading it each step would wait for the accelerator
        self._train_tokens = tokens if self._train_tokens is None else self._train_tokens + tokens
        step = trainer.global_step
        if step > 0 and step % trainer.log_every_n_steps == 0:
            count = float(self._train_tokens)  # waits for what is queued on the device: it is of this time
            seconds = self._train_seconds + self._clock() - self._since
            if seconds > 0:
                self._log(pl_module, trainer, "train", count / seconds)
            self._train_tokens, self._train_seconds = None, 0.0
            self._since = self._clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._continue()

    def _pause(self) -> None:
        if self._since is not None:
            self._train_seconds += self._clock() - self._since
            self._since = None

    def _continue(self) -> None:
        self._since = self._clock()

    # --- rollouts

    def on_rollout_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._pause()
        self._rollout_since, self._sampled = self._clock(), 0.0

    def on_rollout_scored(self, trainer: Trainer, module: LightningModule, answers: Generated, scored: Any) -> None:
        # here and not of what is trained on: some answers may be left out of that
        self._sampled += float(answers.mask.sum())

    def on_rollout_end(self, trainer: Trainer, module: LightningModule, rollouts: Any) -> None:
        if self._rollout_since is not None:
            count = self._sampled
            seconds = self._clock() - self._rollout_since
            self._rollout_since = None
            if seconds > 0:
                self._log(module, trainer, "rollout", count / seconds)
        self._continue()

    def _log(self, module: LightningModule, trainer: Trainer, what: str, tokens_per_second: float) -> None:
        # straight to the loggers: a rollout happens outside of the hooks in which `self.log` may be called
        metrics = {
            f"throughput/{what}_tokens_per_s": tokens_per_second * getattr(module, "data_ranks", trainer.world_size)
        }
        for logger in trainer.loggers:
            logger.log_metrics(
                metrics, step=max(trainer.global_step - 1, 0) if what == "train" else trainer.global_step
            )


def num_real_tokens(batch: Any) -> Tensor | None:
    """How many real tokens a batch holds; None for a batch of another kind."""
    match batch:
        case TokenBatch() | Rollouts() | PairRollouts() | AnswerRollouts():
            return batch.attention_mask.sum()
        case PairBatch():
            real = batch.chosen.attention_mask.sum() + batch.rejected.attention_mask.sum()
            return real if batch.gold is None else real + batch.gold.attention_mask.sum()
        case RankedBatch() | RatedBatch() | UnpairedBatch() | StepBatch():  # mismatched rows are not trained on
            return batch.completions.attention_mask.sum()
        case _:
            return None
