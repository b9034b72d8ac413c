"""What PPO, GRPO and their relatives share: from rewards to credit to a loss per token, its penalties and brakes."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.advantages.answers import OutcomeCredit
from rlhf_lightning.advantages.per_token import rewards_to_come
from rlhf_lightning.advantages.shaping import Limit, ends_of
from rlhf_lightning.core.batches import Generated, Rollouts, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import NO_BREAKDOWN, Credit, PolicyLoss, PolicyLossOutput
from rlhf_lightning.core.kl import kl_estimate, kl_penalty
from rlhf_lightning.core.logprobs import TokenScores
from rlhf_lightning.core.masked import Reduction, masked_centre, masked_moments, masked_whiten, reduce_tokens
from rlhf_lightning.losses.correction import CorrectionOutput, SamplerCorrection
from rlhf_lightning.losses.entropy_control import AdaptiveEntropy, EntropyBonus
from rlhf_lightning.losses.supervised import token_nll
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import EngineFactory, GenerationSpec
from rlhf_lightning.stages.answered import Answered
from rlhf_lightning.stages.on_policy import OldLogprobs, OnPolicyModule
from rlhf_lightning.stages.phases import Phases
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaper, RewardShaping, Shaped
from rlhf_lightning.stages.rollout_metrics import NOTHING_MORE, answer_metrics
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule
from rlhf_lightning.stages.step_means import StepMeans

Whitening = bool | Literal["mean", "sample"]
"""Whether advantages are scaled over a rollout's tokens: to mean 0 and standard deviation 1, or to mean 0 alone."""


class PolicyGradientModule(OnPolicyModule):
    """Trains the policy on rollouts by a loss per token. Abstract: a stage adds its `training_step` and `export`.

        policy_terms = mean_t weight_t loss_t - entropy_coef mean_t entropy_t + kl.loss_coef mean_t kl_t
                       + ptx_coef mean_t nll_t (of the second source)

    Args:
        loss: the policy's loss per token.
        credit: rewards to advantages.
        shaping: what happens to scores before they become rewards.
        kl: the KL penalty in the reward and in the loss.
        entropy_coef: weight of the entropy bonus.
        entropy_control: what moves that weight, from step to step; None: nothing.
        clip_advantages: how far the credit's advantages may go, before KL and whitening; None: as far as they go.
        whiten_advantages: scale advantages to mean 0 and standard deviation 1 over the tokens of the rollout; mean: to
            mean 0 alone; sample: squares divided by n - 1, not n.
        reduction: what the policy's loss is averaged over.
        auxiliary_reduction: what the other terms (KL, entropy, critic) are averaged over; None: the same.
        reduction_length: what `fixed_length` divides by; None: generation.max_new_tokens.
        target_kl: no more optimiser steps on a rollout once the policy has moved this far from the one that sampled it.
        ptx_coef: weight of the likelihood of a second source, data.pretraining.
        correction: weights for answers whose sampler was not quite the policy, or an older one.
        policy, rewards, reference, generation, updates, rows_at_once: as for every on-policy stage.
        engine, use_reference, reference_sync, renormalise_truncated, old_logprobs: likewise.
        optimizer, schedule, lr_scheduler, seed, router_aux_loss_coef, router_aux_loss_over: as for every stage.
    """

    changed_by_steps = ("step_means", "_step_kl", "_step_entropy")

    def __init__(
        self,
        policy: ModelSpec,
        rewards: list[WeightedReward],
        reference: ModelSpec | None,
        generation: GenerationSpec,
        updates: UpdateSpec,
        loss: PolicyLoss,
        credit: Credit,
        shaping: RewardShaping,
        kl: KLSpec,
        entropy_coef: float,
        entropy_control: AdaptiveEntropy | None,
        whiten_advantages: Whitening,
        reduction: Reduction,
        target_kl: float | None,
        ptx_coef: float,
        rows_at_once: int | None,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int | None,
        *,
        engine: EngineFactory = HFGenerate,
        use_reference: bool = True,
        reference_sync: ReferenceSync | None = None,
        renormalise_truncated: bool = True,
        old_logprobs: OldLogprobs = "recomputed",
        correction: SamplerCorrection | None = None,
        clip_advantages: Limit | None = None,
        auxiliary_reduction: Reduction | None = None,
        reduction_length: int | None = None,
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
    ) -> None:
        super().__init__(
            policy,
            rewards,
            reference,
            generation,
            updates,
            rows_at_once,
            optimizer,
            schedule,
            lr_scheduler,
            seed,
            engine=engine,
            use_reference=use_reference,
            reference_sync=reference_sync,
            renormalise_truncated=renormalise_truncated,
            old_logprobs=old_logprobs,
            router_aux_loss_coef=router_aux_loss_coef,
            router_aux_loss_over=router_aux_loss_over,
        )
        for name, value in (("entropy_coef", entropy_coef), ("ptx_coef", ptx_coef)):
            if not value >= 0:
                raise UserError(f"{name}={value} would train towards the opposite: give 0 or more")
        for name, how in (("reduction", reduction), ("auxiliary_reduction", auxiliary_reduction or reduction)):
            if how not in get_args(Reduction):  # given from Python; a YAML is held to the type
                raise UserError(f"{name}={how!r}: use one of {', '.join(get_args(Reduction))}")
        if target_kl is not None and not target_kl > 0:
            raise UserError(f"target_kl={target_kl} would stop every rollout at once: give a positive number, or null")
        if correction is not None and not generation.keep_logprobs:
            raise UserError(
                "correction compares the policy with what the sampler said about its own tokens, and "
                "generation.keep_logprobs is false: set it to true"
            )
        if clip_advantages is not None:
            ends_of(clip_advantages, "clip_advantages")
        if kl.credited == "to_come" and not isinstance(credit, OutcomeCredit):
            raise UserError(
                "kl.credited='to_come' adds each token's KL to a number per answer, and "
                f"credit={type(credit).__name__} gives numbers per token, of rewards that hold the KL: leave it out, "
                "or use a credit such as Centred (with whiten_advantages: true in place of CentredBatchNormalised)"
            )
        if updates.async_rollouts:
            why = "updates.async_rollouts=true trains on answers that an older policy sampled"
            _check_corrected(correction, old_logprobs, why, "async_rollouts")
        if generation.repetition_penalty != 1:
            given = f"generation.repetition_penalty={generation.repetition_penalty}"
            why = f"{given} samples answers from another distribution than the policy's"
            _check_corrected(correction, old_logprobs, why, "repetition_penalty")
        self.correction = correction
        self.loss = loss
        self.credit = credit
        self.kl = kl
        self.shaper = RewardShaper(shaping, kl, self.add_over_ranks, max_length=generation.max_new_tokens)
        self.entropy_bonus = EntropyBonus(entropy_coef, entropy_control)
        self.clip_advantages = clip_advantages
        self.whiten_advantages = whiten_advantages
        self.reduction = reduction
        self.auxiliary_reduction: Reduction = reduction if auxiliary_reduction is None else auxiliary_reduction
        if reduction_length is not None and reduction_length < 1:
            raise UserError(f"reduction_length={reduction_length}: give a number of tokens, such as 1024, or null")
        self.reduction_length = reduction_length
        self.target_kl = target_kl
        self.ptx_coef = ptx_coef
        self._stopped_rollout = -1
        """The rollout on which target_kl ended training early."""
        self._step_kl = StepMeans()
        """The approximate KL over the micro-batches of the current optimiser step."""
        self._step_entropy = StepMeans()
        """The policy's entropy over them."""

    def inseparable(self) -> str | None:
        name = type(self.loss).__name__
        return f"{name} compares the tokens of a micro-batch" if self.loss.whole_batch else None

    def inert_options(self) -> Iterable[tuple[str, str]]:
        yield from super().inert_options()
        if self.old_logprobs == "sampler" and self.correction is not None:
            yield "correction", "old_logprobs are the sampler's own: every ratio is 1 (the loss Corrected weighs anew)"
        if self.kl.loss_coef == 0 and self.kl.loss_estimator != "k3":
            yield "kl.loss_estimator", "kl.loss_coef is 0"
        if self.kl.loss_coef == 0 and not self.kl.loss_importance_weighted:
            yield "kl.loss_importance_weighted", "kl.loss_coef is 0"
        if self.kl.loss_max_weight is not None and not (self.kl.loss_coef and self.kl.loss_importance_weighted):
            yield "kl.loss_max_weight", "no KL in the loss is weighted"
        if self.kl.control.initial_coef == 0:
            if self.kl.estimator != "k1":
                yield "kl.estimator", "the coefficient of the KL in the reward is 0"
            if self.kl.credited != "with_score":
                yield "kl.credited", "the coefficient of the KL in the reward is 0"
            if self.kl.bound is not None and not self.kl.loss_coef:
                yield "kl.bound", "KL is neither in the reward nor in the loss"
        if self.reduction_length is not None and "fixed_length" not in (self.reduction, self.auxiliary_reduction):
            yield "reduction_length", "no reduction is fixed_length"
        if self.auxiliary_reduction != self.reduction and not self._has_auxiliary_terms:
            yield "auxiliary_reduction", "there is neither KL in the loss nor an entropy bonus"
        if self.shaper.shaping.missing_eos_score is not None and self.shaper.shaping.missing_eos_penalty:
            yield "shaping.missing_eos_penalty", "missing_eos_score replaces the score it would be subtracted from"
        if self.shaper.shaping.missing_eos_score is not None and self.shaper.shaping.missing_eos_factor != 1:
            yield "shaping.missing_eos_factor", "missing_eos_score replaces the score it would be multiplied by"
        if self.shaper.shaping.overlong_cache is None and self.shaper.shaping.overlong_factor != 1:
            yield "shaping.overlong_factor", "shaping.overlong_cache is not set"

    @property
    def _has_auxiliary_terms(self) -> bool:
        """Whether anything but the policy's own loss is averaged over the answers."""
        return bool(self.kl.loss_coef) or self.entropy_bonus.enabled

    @property
    def reads_pretraining(self) -> bool:
        return self.ptx_coef != 0

    def extra_loader(self) -> Iterable[TokenBatch] | None:
        if not self.ptx_coef:
            return None
        loader = self.trainer.datamodule.pretraining_dataloader()  # type: ignore[attr-defined]
        if loader is None:
            raise UserError(f"ptx_coef={self.ptx_coef} needs a second source: give data.pretraining, or set it to 0")
        return loader

    # ---- collecting ------------------------------------------------------------------------------------------------

    def prepare(self, answered: Answered, phase: Phases) -> tuple[Rollouts, dict[str, float]]:
        """Measured under policy, reference and critic, credited, and chosen from."""
        answers, scored = answered.answers, answered.scored
        with self.measuring(), phase("measure"):
            old, entropy, per_token = self._measure_policy(answers)
            ref = self._measure_reference(answers)
            values = self.values_of(answered)
        if self.correction is not None and self.credit.baseline == "variance":
            values = values * self._correction_of(old, answers).weights.square()  # as the gradient is weighed
        shaped = self.shape_rewards(answers, scored, old, ref)
        rewards, apart = shaped.rewards, {}
        if shaped.kl_rewards is not None:
            rewards, apart = rewards + shaped.kl_rewards, {"kl_rewards": shaped.kl_rewards}
        advantages, returns = self.advantages(
            shaped.rewards, values, answers.mask, answered.groups, scored.weighted, **apart
        )
        rollouts = Rollouts(
            tokens=answers.tokens,
            attention_mask=answers.attention_mask,
            mask=answers.mask,
            positions=answers.positions,
            finished=answers.finished,
            scores=scored.total.to(self.device),
            old_logprobs=old,
            ref_logprobs=ref,
            rewards=rewards,
            advantages=advantages,
            values=values,
            returns=returns,
            groups=answered.groups,
            kept=answers.kept,
        )
        metrics = self.rollout_metrics(rollouts, scored, shaped, entropy, per_token) | dict(answered.metrics)
        rollouts, more = self.choose(rollouts, answered, entropy)
        return rollouts, metrics | more

    def choose(self, rollouts: Rollouts, answered: Answered, entropy: Tensor) -> tuple[Rollouts, dict[str, float]]:
        """What of the rollouts is trained on, and with what weight; metrics of the choice.

        Here: everything, each token with the weight of its sampler's mistake.
        """
        return self._corrected(rollouts, answered)

    def _corrected(self, rollouts: Rollouts, answered: Answered) -> tuple[Rollouts, dict[str, float]]:
        """The policy's loss of every token is multiplied by what `correction` makes of its sampler."""
        if self.correction is None:
            return rollouts, {}
        mask = rollouts.mask
        corrected = self._correction_of(rollouts.old_logprobs, answered.answers)
        sums = [torch.where(mask, x, 0.0).sum().double() for x in corrected.metrics.values()]
        *sums, tokens = self.add_over_ranks(torch.stack((*sums, mask.sum().double()))).tolist()
        names = [f"correction/{name}" for name in corrected.metrics]
        metrics = {name: total / max(tokens, 1) for name, total in zip(names, sums, strict=True)}
        weights = corrected.weights if rollouts.weights is None else rollouts.weights * corrected.weights
        return replace(rollouts, weights=weights), metrics

    def _correction_of(self, old: Tensor, answers: Generated) -> CorrectionOutput:
        assert self.correction is not None
        if answers.sampler_logprobs is None:
            raise UserError(
                f"correction compares the policy with its sampler, and {type(self.engine).__name__} does not say the "
                "log-probabilities of its tokens: use another engine, or leave correction out"
            )
        return self.correction(old, answers.sampler_logprobs, answers.mask, add_over_ranks=self.add_over_ranks)

    def values_of(self, answered: Answered) -> Tensor:
        """What the credit compares with, [batch, time]: a critic's estimate before each token; 0 without a critic."""
        return torch.zeros(answered.answers.tokens.shape, device=self.device)

    def shape_rewards(self, answers: Generated, scored: ScoredSamples, old: Tensor, ref: Tensor) -> Shaped:
        """Score at the last answer token, KL at every one, after the options of `shaping`."""
        return self.shaper(answers, scored, old, ref)

    def advantages(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        groups: Tensor,
        breakdown: Mapping[str, Tensor] = NO_BREAKDOWN,
        kl_rewards: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns, both 0 where nothing counts.

        Args:
            kl_rewards: of each token, beside `rewards`: what the credit does not see, and each token and those before
                it are credited with.
        """
        advantages, returns = self.credit(
            rewards, values, mask, groups, breakdown=breakdown, add_over_ranks=self.add_over_ranks
        )
        if self.clip_advantages is not None:
            advantages = torch.where(mask, advantages.clamp(*ends_of(self.clip_advantages)), 0.0)
        if kl_rewards is not None:
            to_come = rewards_to_come(kl_rewards, mask)
            advantages, returns = advantages + to_come, returns + to_come
        if self.whiten_advantages:
            moments = self.add_over_ranks(masked_moments(advantages, mask))
            if self.whiten_advantages == "mean":
                return masked_centre(advantages, mask, moments=moments), returns
            ddof = 1 if self.whiten_advantages == "sample" else 0
            advantages = masked_whiten(advantages, mask, moments=moments, ddof=ddof)
        return advantages, returns

    def rollout_metrics(
        self,
        rollouts: Rollouts,
        scored: ScoredSamples,
        shaped: Shaped,
        entropy: Tensor,
        per_token: Mapping[str, Tensor] = NOTHING_MORE,
    ) -> dict[str, float]:
        """What a rollout looked like, over the sequences and tokens of all ranks; padding counts nowhere.

        Args:
            per_token: further numbers [batch, time], by the names of their metrics.
        """
        per_sequence = {"rollout/reward": rollouts.rewards.sum(-1)}
        per_token = {"rollout/entropy": entropy, **per_token}
        if self.use_reference:
            kl = kl_estimate(rollouts.old_logprobs, rollouts.ref_logprobs, "k1")  # both are 0 where nothing counts
            per_sequence["rollout/kl"] = kl.sum(-1)
            per_token["rollout/kl_per_token"] = kl
        return answer_metrics(rollouts, scored, self.add_over_ranks, per_sequence, per_token) | dict(shaped.metrics)

    # ---- training --------------------------------------------------------------------------------------------------

    def policy_loss(self, batch: Rollouts, scores: TokenScores) -> PolicyLossOutput:
        """The policy's loss per token."""
        return self.loss(scores.logprobs, batch.old_logprobs, batch.advantages, batch.mask)

    def policy_scores(self, batch: Rollouts, hidden: Tensor) -> TokenScores:
        """Log-probabilities of a minibatch, from hidden states, over what its answers were sampled from."""
        assert self.policy is not None
        return self.policy.scores(
            hidden,
            batch.tokens,
            batch.mask,
            temperature=self.generation.temperature,
            with_entropy=self.entropy_bonus.enabled,
            kept=batch.kept,
        )

    def policy_terms(self, batch: Rollouts, scores: TokenScores) -> dict[str, Tensor]:
        """The terms of the loss that train the policy, each already this micro-batch's share; their metrics noted."""
        policy = self.policy_loss(batch, scores)
        per_token = policy.per_token if batch.weights is None else policy.per_token * batch.weights
        terms = {"policy": self._mean(per_token, batch)}
        if scores.entropy is not None:
            weight = self.entropy_bonus.weight
            terms["entropy"] = -weight * self._auxiliary_mean(scores.entropy, batch)
            self.step_means.add({"policy/entropy": scores.entropy}, batch.mask)
            if self.entropy_bonus.control is not None:
                self._step_entropy.add({"entropy": scores.entropy}, batch.mask)
                used = torch.full_like(scores.entropy, weight)
                self.step_means.add({"policy/entropy_coef": used}, batch.mask)
        if self.kl.loss_coef:
            kl = kl_penalty(
                scores.logprobs,
                batch.ref_logprobs,
                batch.old_logprobs,
                estimator=self.kl.loss_estimator,
                importance_weighted=self.kl.loss_importance_weighted,
                bound=self.kl.bound,
                max_weight=self.kl.loss_max_weight,
            )
            terms["kl"] = self.kl.loss_coef * self._auxiliary_mean(kl, batch)
        if self.ptx_coef:
            terms["ptx"] = self.ptx_coef * self._ptx(batch)
        approx_kl = kl_estimate(batch.old_logprobs, scores.logprobs.detach(), "k3")
        self._count_step_kl(approx_kl, batch)
        self.step_means.add(
            {
                "policy/loss": per_token,
                "policy/ratio": policy.ratio,
                "policy/clip_frac": policy.clipped.float(),
                "policy/approx_kl": approx_kl,
            },
            batch.mask,
        )
        return terms

    def takes_part(self) -> bool:
        """Log what was collected; False where this piece of a rollout takes no step any more."""
        self.log_pending()
        return not self._is_stopped

    def _mean(self, per_token: Tensor, batch: Rollouts) -> Tensor:
        """This micro-batch's share of the step's mean of the policy's loss."""
        return self._reduced(per_token, batch, self.reduction)

    def _auxiliary_mean(self, per_token: Tensor, batch: Rollouts) -> Tensor:
        """The same of another term."""
        return self._reduced(per_token, batch, self.auxiliary_reduction)

    def _reduced(self, per_token: Tensor, batch: Rollouts, how: Reduction) -> Tensor:
        denominator = batch.total("tokens" if how == "token_mean" else "sequences")
        length = self.reduction_length or self.generation.max_new_tokens
        return reduce_tokens(per_token, batch.mask, how, denominator, max_length=length)

    def _ptx(self, batch: Rollouts) -> Tensor:
        assert self.policy is not None
        assert batch.extra is not None
        nll = token_nll(self.policy(batch.extra).logprobs)
        self.step_means.add({"ptx/loss": nll}, batch.extra.mask)
        return reduce_tokens(nll, batch.extra.mask, "token_mean", batch.total("extra_tokens"))

    # ---- steps that are not taken ----------------------------------------------------------------------------------

    @property
    def _is_stopped(self) -> bool:
        return self._loader is not None and self._stopped_rollout == self._loader.rollouts

    def _count_step_kl(self, approx_kl: Tensor, batch: Rollouts) -> None:
        if self.target_kl is not None:
            self._step_kl.add({"kl": approx_kl}, batch.mask)

    def skips_step(self) -> bool:
        """Also the steps that are left of a rollout that the policy has moved too far from."""
        return self._is_stopped or super().skips_step()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the rollout once the policy has moved too far from the one that sampled it."""
        skipped = self.skips_step()
        super().optimizer_step(*args, **kwargs)
        if self.entropy_bonus.control is not None and not skipped:
            means = self._step_entropy.take(self.add_over_ranks)
            if means:  # none of a step that trains the critic alone
                self.entropy_bonus.observe(float(means["entropy"]))
        if self.target_kl is not None and not skipped:
            moved = self._step_kl.take(self.add_over_ranks)["kl"]
            if float(moved) > self.target_kl:
                self._stopped_rollout = self._loader.rollouts

    # ---- state -----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["policy_gradient"] = {
            "shaper": self.shaper.state_dict(),
            "stopped_rollout": self._stopped_rollout,
            "entropy_bonus": self.entropy_bonus.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state: Mapping[str, Any] = checkpoint.get("policy_gradient", {})
        if state:
            self.shaper.load_state_dict(state["shaper"])
            self._stopped_rollout = state["stopped_rollout"]
            if "entropy_bonus" in state:  # checkpoints from before it could move say nothing of it
                self.entropy_bonus.load_state_dict(state["entropy_bonus"])


def _check_corrected(correction: SamplerCorrection | None, old_logprobs: OldLogprobs, why: str, option: str) -> None:
    """Answers of another distribution must not count as the policy's own.

    Args:
        why: they are of another, in words.
        option: what makes them so.
    """
    if correction is None:
        raise UserError(
            f"{why}, and correction=null would count them as the policy's own: set correction: {{cap: 2.0}} (TIS) or "
            f"another one and generation.keep_logprobs: true, or leave {option} out"
        )
    if correction.weight == "none":
        raise UserError(
            f"{why}, and correction.weight='none' weighs none of them: set it to token or sequence, or leave {option} "
            "out"
        )
    if old_logprobs == "sampler":
        raise UserError(
            f"{why}, and old_logprobs='sampler' leaves correction without the policy's own log-probabilities: set it "
            f"to recomputed, or leave {option} out"
        )
