"""Proximal policy optimisation with a critic: every implementation detail an option, with the paper that named it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.advantages.gae import Gae
from rlhf_lightning.core.batches import Generated, Rollouts, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Credit, PolicyLoss, PolicyLossOutput, ValueLoss
from rlhf_lightning.core.kl import kl_estimate, kl_penalty
from rlhf_lightning.core.logprobs import TokenScores
from rlhf_lightning.core.masked import Reduction, explained_variance, masked_moments, masked_whiten, reduce_tokens
from rlhf_lightning.losses.policy import ClippedSurrogate
from rlhf_lightning.losses.supervised import token_nll
from rlhf_lightning.losses.value import ClippedValue
from rlhf_lightning.models.export import export_policy, export_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rollout.generate import GenerationSpec
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.stages.critic import Critic, CriticSpec, build_critic, critic_values
from rlhf_lightning.stages.on_policy import OnPolicyModule
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaper, RewardShaping, Shaped
from rlhf_lightning.stages.schedule import Schedule


class PPOModule(OnPolicyModule):
    """PPO on rewards minus KL, with a critic.

        rewards_t = - kl_coef kl_t + (score at the last token of the answer)
        loss = mean_t clipped_surrogate_t + value_coef mean_t clipped_value_t - entropy_coef mean_t entropy_t
               + kl.loss_coef mean_t kl_t + ptx_coef mean_t nll_t (of the second source)

    Means are over the answer tokens of the whole optimiser step, over micro-batches and ranks.

    Args:
        policy: the model to train.
        rewards: functions that score answers, with their weights: a trained reward model, any Python callable, rules.
        critic: a model of its own or a head on the policy.
        reference: the model that KL is measured against; None: the policy as it was at the start.
        generation: how answers are sampled; log-probabilities are taken at its temperature.
        updates: inner epochs and minibatches.
        loss: the policy's loss per token (asymmetric and dual clip are its options).
        value_loss: the critic's loss per token.
        credit: rewards and values to advantages.
        shaping: what happens to scores before they become rewards.
        kl: the KL penalty in the reward and in the loss.
        value_coef: weight of the critic's loss (Ziegler et al., 2019: 0.1).
        entropy_coef: weight of the entropy bonus (Schulman et al., 2017; 0 in RLHF as a rule).
        whiten_advantages: scale advantages to mean 0 and standard deviation 1 over the tokens of the rollout, all ranks
            together (Ziegler et al., 2019).
        reduction: what the loss is averaged over.
        target_kl: no more optimiser steps on a rollout once the policy has moved this far from the one that sampled it
            (nats per token, mean over a step; Spinning Up).
        critic_warmup_steps: optimiser steps in which only the critic learns.
        ptx_coef: weight of the likelihood of a second source, data.pretraining (Ouyang et al., 2022: PPO-ptx).
        rows_at_once: sequences measured in one forward pass while collecting; None: all.
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of sampling and minibatch order; None: the run's.

    References:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017. arXiv:1707.06347
        Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019. arXiv:1909.08593
        Huang et al., The N+ Implementation Details of RLHF with PPO, 2024. arXiv:2403.17031
    """

    def __init__(
        self,
        policy: ModelSpec,
        rewards: list[WeightedReward],
        critic: CriticSpec = CriticSpec(),
        reference: ModelSpec | None = None,
        generation: GenerationSpec = GenerationSpec(),
        updates: UpdateSpec = UpdateSpec(),
        loss: PolicyLoss = ClippedSurrogate(),
        value_loss: ValueLoss = ClippedValue(),
        credit: Credit = Gae(),
        shaping: RewardShaping = RewardShaping(),
        kl: KLSpec = KLSpec(),
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        whiten_advantages: bool = True,
        reduction: Reduction = "token_mean",
        target_kl: float | None = None,
        critic_warmup_steps: int = 0,
        ptx_coef: float = 0.0,
        rows_at_once: int | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        schedule: Schedule = Schedule(),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            policy, rewards, reference, generation, updates, rows_at_once, optimizer, schedule, lr_scheduler, seed
        )
        for name, value in (("value_coef", value_coef), ("entropy_coef", entropy_coef), ("ptx_coef", ptx_coef)):
            if not value >= 0:
                raise UserError(f"{name}={value} would train towards the opposite: give 0 or more")
        if target_kl is not None and not target_kl > 0:
            raise UserError(f"target_kl={target_kl} would stop every rollout at once: give a positive number, or null")
        self.save_hyperparameters()
        self.critic_spec = critic
        self.loss = loss
        self.value_loss = value_loss
        self.credit = credit
        self.kl = kl
        self.shaper = RewardShaper(shaping, kl, self.add_over_ranks)
        self.value_coef = value_coef
        self.entropy_coef = entropy_coef
        self.whiten_advantages = whiten_advantages
        self.reduction = reduction
        self.target_kl = target_kl
        self.critic_warmup_steps = critic_warmup_steps
        self.ptx_coef = ptx_coef
        self.critic: Critic | None = None
        self._stopped_rollout = -1
        """The rollout on which target_kl ended training early."""
        self._step_kl = [0.0, 0.0]
        """Sum and count of the approximate KL over the micro-batches of the current optimiser step."""

    def inert_options(self) -> Iterable[tuple[str, str]]:
        yield from super().inert_options()
        if self.kl.loss_coef == 0 and self.kl.loss_estimator != "k3":
            yield "kl.loss_estimator", "kl.loss_coef is 0"
        if self.kl.loss_coef == 0 and self.kl.loss_importance_weighted:
            yield "kl.loss_importance_weighted", "kl.loss_coef is 0"
        if self.kl.control.initial_coef == 0 and self.kl.estimator != "k1":
            yield "kl.estimator", "the coefficient of the KL in the reward is 0"
        if self.value_coef == 0:
            yield "value_coef", "0 leaves the critic untrained while its values are used"
        if self.critic_spec.model is None and not self.critic_spec.keep_head:
            yield "critic.keep_head", "the critic starts from no reward model: its head is zeros in any case"
        if self.shaper.shaping.missing_eos_score is not None and self.shaper.shaping.missing_eos_penalty:
            yield "shaping.missing_eos_penalty", "missing_eos_score replaces the score it would be subtracted from"

    # ---- building --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        super().configure_model()
        if self.critic is None:
            assert self.policy is not None
            self.critic = build_critic(self.critic_spec, self.policy, self.model_spec, seed=self.seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        assert self.policy is not None
        assert self.critic is not None
        critic: dict[str, Any] = {"params": [p for p in self.critic.parameters() if p.requires_grad]}
        if self.critic_spec.learning_rate is not None:
            critic["lr"] = self.critic_spec.learning_rate
        return [{"params": [p for p in self.policy.parameters() if p.requires_grad]}, critic]

    def extra_loader(self) -> Iterable[TokenBatch] | None:
        if not self.ptx_coef:
            return None
        loader = self.trainer.datamodule.pretraining_dataloader()  # type: ignore[attr-defined]
        if loader is None:
            raise UserError(f"ptx_coef={self.ptx_coef} needs a second source: give data.pretraining, or set it to 0")
        return loader

    # ---- collecting ------------------------------------------------------------------------------------------------

    def values_of(self, answers: Generated) -> Tensor:
        assert self.policy is not None
        assert self.critic is not None
        values = [critic_values(self.critic, self.policy, part) for part in self._parts(answers)]
        return torch.where(answers.mask, torch.cat(values).float(), 0.0)

    def shape_rewards(self, answers: Generated, scored: ScoredSamples, old: Tensor, ref: Tensor) -> Shaped:
        """Score at the last answer token, KL at every one, after the options of `shaping`."""
        return self.shaper(answers, scored, old, ref)

    def advantages(self, rewards: Tensor, values: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        advantages, returns = self.credit(rewards, values, mask, groups, add_over_ranks=self.add_over_ranks)
        if self.whiten_advantages:
            moments = self.add_over_ranks(masked_moments(advantages, mask))
            advantages = masked_whiten(advantages, mask, moments=moments)
        return advantages, returns

    def rollout_metrics(
        self, rollouts: Rollouts, scored: ScoredSamples, shaped: Shaped, entropy: Tensor
    ) -> dict[str, float]:
        """Those of every rollout, and how much of the returns the critic explained before it was trained on them."""
        metrics = super().rollout_metrics(rollouts, scored, shaped, entropy)
        explained = explained_variance(
            rollouts.values, rollouts.returns, rollouts.mask, add_over_ranks=self.add_over_ranks
        )
        return metrics | {"value/explained_variance": float(explained)}

    # ---- training --------------------------------------------------------------------------------------------------

    def policy_loss(self, batch: Rollouts, scores: TokenScores) -> PolicyLossOutput:
        """The policy's loss per token."""
        return self.loss(scores.logprobs, batch.old_logprobs, batch.advantages, batch.mask)

    def training_step(self, batch: Rollouts, batch_idx: int) -> Tensor:
        self.log_pending()
        if self._is_stopped:
            # the remaining pieces of this rollout take no step; every parameter takes part, for DDP's sake
            return sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0  # type: ignore[return-value]
        assert self.policy is not None
        assert self.critic is not None
        hidden = self.policy.hidden_states(batch.tokens, batch.attention_mask, batch.positions)
        scores = self.policy.scores(
            hidden,
            batch.tokens,
            batch.mask,
            temperature=self.generation.temperature,
            with_entropy=self.entropy_coef != 0,
        )
        values = critic_values(self.critic, self.policy, batch, hidden)
        policy = self.policy_loss(batch, scores)
        per_value, value_clipped = self.value_loss(values, batch.values, batch.returns)
        terms = {"policy": self._mean(policy.per_token, batch), "value": self.value_coef * self._mean(per_value, batch)}
        if scores.entropy is not None:
            terms["entropy"] = -self.entropy_coef * self._mean(scores.entropy, batch)
            self.step_means.add({"policy/entropy": scores.entropy}, batch.mask)
        if self.kl.loss_coef:
            kl = kl_penalty(
                scores.logprobs,
                batch.ref_logprobs,
                batch.old_logprobs,
                estimator=self.kl.loss_estimator,
                importance_weighted=self.kl.loss_importance_weighted,
            )
            terms["kl"] = self.kl.loss_coef * self._mean(kl, batch)
        if self.ptx_coef:
            terms["ptx"] = self.ptx_coef * self._ptx(batch)
        loss = torch.stack(list(terms.values())).sum()
        self._count_step_kl(scores, batch)
        per_token = {
            "policy/loss": policy.per_token,
            "policy/ratio": policy.ratio,
            "policy/clip_frac": policy.clipped.float(),
            "policy/approx_kl": kl_estimate(batch.old_logprobs, scores.logprobs.detach(), "k3"),
            "value/loss": per_value,
            "value/clip_frac": value_clipped.float(),
            "value/mean": values,
            "value/return": batch.returns,
        }
        self.step_means.add(per_token, batch.mask)
        self.log_step_means(batch_idx)
        return loss * self.loss_scale

    def _mean(self, per_token: Tensor, batch: Rollouts) -> Tensor:
        """This micro-batch's share of the step's mean."""
        denominator = batch.total("tokens" if self.reduction == "token_mean" else "sequences")
        return reduce_tokens(
            per_token, batch.mask, self.reduction, denominator, max_length=self.generation.max_new_tokens
        )

    def _ptx(self, batch: Rollouts) -> Tensor:
        assert self.policy is not None
        assert batch.extra is not None
        nll = token_nll(self.policy(batch.extra).logprobs)
        self.step_means.add({"ptx/loss": nll}, batch.extra.mask)
        return reduce_tokens(nll, batch.extra.mask, "token_mean", batch.total("extra_tokens"))

    # ---- early stop and critic warm-up -----------------------------------------------------------------------------

    @property
    def _is_stopped(self) -> bool:
        return self._loader is not None and self._stopped_rollout == self._loader.rollouts

    def _count_step_kl(self, scores: TokenScores, batch: Rollouts) -> None:
        if self.target_kl is not None:
            kl = kl_estimate(batch.old_logprobs, scores.logprobs.detach(), "k3")
            self._step_kl[0] += float(torch.where(batch.mask, kl, 0.0).sum())
            self._step_kl[1] += float(batch.mask.sum())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.global_step < self.critic_warmup_steps:
            # no gradient, not a zero one: Adam would still decay and move on its momentum
            assert self.policy is not None
            for parameter in self.policy.parameters():
                parameter.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Skips the steps that are left of a rollout that the policy has moved too far from."""
        if self._is_stopped:
            closure = kwargs.get("optimizer_closure") or args[3]
            closure()
            return
        super().optimizer_step(*args, **kwargs)
        if self.target_kl is not None:
            total, count = self.add_over_ranks(torch.tensor(self._step_kl, dtype=torch.float64)).tolist()
            self._step_kl = [0.0, 0.0]
            if total > self.target_kl * count:
                self._stopped_rollout = self._loader.rollouts

    # ---- state and export ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {
            "shaper": self.shaper.state_dict(),
            "stopped_rollout": self._stopped_rollout,
            "pending_metrics": dict(self._pending_metrics),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state: Mapping[str, Any] = checkpoint.get("ppo", {})
        if state:
            self.shaper.load_state_dict(state["shaper"])
            self._stopped_rollout = state["stopped_rollout"]
            self._pending_metrics = dict(state["pending_metrics"])

    def export(self, folder: str | Path) -> Path:
        """The policy to `folder`, a separate critic to `folder`/critic."""
        assert self.policy is not None, "nothing to export before the model is built"
        written = export_policy(self.policy, self.tokenizer, folder, card=self.card("Policy trained with PPO"))
        if isinstance(self.critic, ScalarModel):
            export_scalar_model(
                self.critic, self.tokenizer, Path(folder) / "critic", card=self.card("Critic of a PPO policy")
            )
        return written
