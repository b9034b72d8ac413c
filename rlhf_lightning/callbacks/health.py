"""Signs that a run goes wrong although nothing is broken, each with a name and with what to try."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlhf_lightning.core.batches import Rollouts

REMEDIES = {
    "ratio_not_1": "the policy that trains is not the one that sampled: look for dropout, another temperature or "
    "attention, weights changed between sampling and training; bf16 needs old_logprobs from the trainer",
    "negative_kl": "the policy seems nearer to the reference than to itself, which no honest sample shows: check "
    "stop strings, top_k/top_p (renormalise_truncated), a reference with another template or precision",
    "dead_groups": "all answers to most prompts score the same and teach nothing: mix easier and harder prompts, raise "
    "num_samples or temperature, use dynamic_sampling, give a finer reward",
    "entropy_collapse": "answers have become nearly deterministic: lower the learning rate, raise the KL coefficient, "
    "entropy_coef or clip_high, raise the sampling temperature",
    "length_drift": "answers grew or shrank far from where they began: read samples.jsonl; add a length penalty, raise "
    "the KL coefficient, check that the reward does not pay for length",
    "length_reward": "the reward goes with the length of the answer: normalise it, add a length penalty, or balance "
    "lengths in the reward model's pairs",
    "clip_saturation": "most tokens are clipped and teach nothing: lower the learning rate, fewer inner_epochs, a "
    "larger batch, target_kl",
    "missing_eos": "most answers are cut off: raise max_new_tokens, set missing_eos_penalty, check the end token of "
    "the template and of the SFT data",
    "overoptimised": "the reward rises while held-out gold falls: stop here or take an earlier checkpoint, raise the "
    "KL coefficient, retrain the reward model on fresh answers",
}


class Health(Callback):
    """Watches rollouts and metrics, and warns: on stderr, as `health/NAME` in the loggers, as a line of `health.jsonl`.

    A warning is given when a sign appears, and again only after it was gone. Rollouts are judged by the first
    process's share of them.

    Args:
        in_a_row: rollouts (validations, for `overoptimised`) that must show a sign; `ratio_not_1` and `negative_kl`
            are never right and warn at once.
        ratio_tolerance: of the mean ratio of a rollout's first minibatch, which is 1 (approximate KL: 0).
        negative_kl: mean sequence KL to the reference below this (nats).
        dead_group_frac: share of prompts whose answers all score the same.
        entropy_frac: entropy as a share of the first rollout's.
        length_factor: mean length over the first rollout's, or the other way round.
        length_correlation: of scores and lengths within a rollout.
        clip_frac: share of clipped tokens in a step.
        finished_frac: share of answers that end by themselves.
        gold: a metric of validation that measures what is really wanted, such as `val/reward_gold` of a reward called
            gold with weight 0.
    """

    def __init__(
        self,
        in_a_row: int = 3,
        ratio_tolerance: float = 0.01,
        negative_kl: float = -1.0,
        dead_group_frac: float = 0.8,
        entropy_frac: float = 0.2,
        length_factor: float = 3.0,
        length_correlation: float = 0.8,
        clip_frac: float = 0.5,
        finished_frac: float = 0.5,
        gold: str | None = None,
    ) -> None:
        self.in_a_row = in_a_row
        self.ratio_tolerance = ratio_tolerance
        self.negative_kl = negative_kl
        self.dead_group_frac = dead_group_frac
        self.entropy_frac = entropy_frac
        self.length_factor = length_factor
        self.length_correlation = length_correlation
        self.clip_frac = clip_frac
        self.finished_frac = finished_frac
        self.gold = gold
        self._shown: dict[str, int] = {}
        """How often in a row each sign was seen."""
        self._first: dict[str, float] = {}
        """Numbers of the first rollout."""
        self._best: tuple[float, float] | None = None
        """The best gold, and the rollouts' score then."""
        self._is_first_step = False
        self._clipped = 0.0

    # --- rollouts

    def on_rollout_end(self, trainer: Trainer, module: LightningModule, rollouts: Any) -> None:
        if not isinstance(rollouts, Rollouts):
            return
        self._is_first_step = True
        self._judge(trainer, "clip_saturation", self._clipped, self._clipped > self.clip_frac)
        self._clipped = 0.0
        counts = rollouts.mask.any(-1)
        scores, lengths = rollouts.scores[counts].float(), rollouts.mask.sum(-1)[counts].float()
        dead = dead_frac(scores, rollouts.groups[counts])
        if dead is not None:
            self._judge(trainer, "dead_groups", dead, dead >= self.dead_group_frac)
        related = correlation(scores, lengths)
        self._judge(trainer, "length_reward", related, abs(related) > self.length_correlation)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        if not self._is_first_step:
            # read where the loggers read anyway: each reading waits for the device
            if trainer.global_step % trainer.log_every_n_steps == 0:
                clipped = trainer.callback_metrics.get("policy/clip_frac")
                self._clipped = max(self._clipped, 0.0 if clipped is None else float(clipped))
            return
        skips = getattr(pl_module, "skips_step", None)
        if callable(skips) and skips():
            return  # nothing was trained on yet, and nothing of this rollout measured
        self._is_first_step = False
        self._judge_metrics(trainer, {name: float(value) for name, value in trainer.callback_metrics.items()})

    def _judge_metrics(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """With a rollout's first step, when its metrics are logged."""
        ratio, moved = metrics.get("policy/ratio", 1.0), metrics.get("policy/approx_kl", 0.0)
        if not metrics.get("policy/off_policy_frac"):  # replayed answers come from an older policy
            off = max(abs(ratio - 1), abs(moved))
            self._judge(trainer, "ratio_not_1", ratio, off > self.ratio_tolerance, at_once=True)
        if (kl := metrics.get("rollout/kl")) is not None:
            self._judge(trainer, "negative_kl", kl, kl < self.negative_kl, at_once=True)
        if (finished := metrics.get("rollout/finished_frac")) is not None:
            self._judge(trainer, "missing_eos", finished, finished < self.finished_frac)
        if (entropy := metrics.get("rollout/entropy")) is not None:
            first = self._first.setdefault("entropy", entropy)
            self._judge(trainer, "entropy_collapse", entropy, entropy < self.entropy_frac * first)
        if (length := metrics.get("rollout/length")) is not None:
            first = max(self._first.setdefault("length", length), 1e-9)
            far = max(length / first, first / max(length, 1e-9))
            self._judge(trainer, "length_drift", length, far > self.length_factor)

    # --- validation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        if self.gold is None or trainer.sanity_checking or self.gold not in metrics:
            return
        gold, score = float(metrics[self.gold]), float(metrics.get("rollout/score", math.nan))
        if self._best is None or gold >= self._best[0]:
            self._best = (gold, score)
        self._judge(trainer, "overoptimised", gold, gold < self._best[0] and score > self._best[1])

    # --- warnings

    def _judge(self, trainer: Trainer, name: str, value: float, is_bad: bool, *, at_once: bool = False) -> None:
        self._shown[name] = self._shown.get(name, 0) + 1 if is_bad else 0
        if self._shown[name] == (1 if at_once else self.in_a_row) and trainer.is_global_zero:
            self._warn(trainer, name, value)

    def _warn(self, trainer: Trainer, name: str, value: float) -> None:
        print(
            f"health, step {trainer.global_step}: {name} ({value:.4g}): {REMEDIES[name]}", file=sys.stderr, flush=True
        )
        for logger in trainer.loggers:
            logger.log_metrics({f"health/{name}": value}, step=trainer.global_step)
        row = {"step": trainer.global_step, "name": name, "value": value, "try": REMEDIES[name]}
        with (Path(trainer.default_root_dir) / "health.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"shown": dict(self._shown), "first": dict(self._first), "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._shown, self._first = dict(state_dict["shown"]), dict(state_dict["first"])
        self._best = None if state_dict["best"] is None else tuple(state_dict["best"])


def dead_frac(scores: Tensor, groups: Tensor) -> float | None:
    """Share of the groups of two or more whose scores are all equal; None if there are no such groups."""
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    low = torch.full_like(sizes, math.inf, dtype=scores.dtype).scatter_reduce(0, index, scores, "amin")
    high = torch.full_like(sizes, -math.inf, dtype=scores.dtype).scatter_reduce(0, index, scores, "amax")
    several = sizes > 1
    return float((low == high)[several].float().mean()) if bool(several.any()) else None


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two samples; 0 for fewer than 16 values, which show nothing, and for constants."""
    if len(x) < 16:
        return 0.0
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 1e-12 else 0.0
