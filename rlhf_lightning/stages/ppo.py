"""Proximal policy optimisation with a critic: every implementation detail an option, with the paper that named it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.advantages.gae import Gae
from rlhf_lightning.advantages.shaping import Limit
from rlhf_lightning.core.batches import Rollouts
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Credit, PolicyLoss, ValueLoss
from rlhf_lightning.core.masked import Reduction, explained_variance
from rlhf_lightning.losses.correction import SamplerCorrection
from rlhf_lightning.losses.entropy_control import AdaptiveEntropy
from rlhf_lightning.losses.policy import ClippedSurrogate
from rlhf_lightning.losses.value import ClippedValue
from rlhf_lightning.models.export import export_policy, export_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.sharded import gathered_once
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.resample import Resample
from rlhf_lightning.rollout.spec import EngineFactory, GenerationSpec
from rlhf_lightning.stages.answered import Answered
from rlhf_lightning.stages.critic import Critic, CriticSpec, build_critic, critic_values
from rlhf_lightning.stages.on_policy import OldLogprobs
from rlhf_lightning.stages.policy_gradient import PolicyGradientModule, Whitening
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping, Shaped
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule


class PPOModule(PolicyGradientModule):
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
        entropy_control: moves that weight, so that entropy does not fall below a target (He et al., 2025); None: it
            stays.
        clip_advantages: how far the credit's advantages may go, c for -c to c or both ends; None: as far as they go.
        whiten_advantages: scale advantages to mean 0 and standard deviation 1 over the tokens of the rollout, all ranks
            together (Ziegler et al., 2019); mean: to mean 0 alone; sample: squares divided by n - 1 (verl), not n.
        reduction: what the policy's loss is averaged over.
        reduction_length: what `fixed_length` divides by; None: generation.max_new_tokens.
        auxiliary_reduction: what KL, entropy and the critic's loss are averaged over; None: the same (OpenRLHF: always
            token_mean).
        target_kl: no more optimiser steps on a rollout once the policy has moved this far from the one that sampled it
            (nats per token, mean over a step; Spinning Up).
        critic_warmup_steps: optimiser steps in which only the critic learns.
        ptx_coef: weight of the likelihood of a second source, data.pretraining (Ouyang et al., 2022: PPO-ptx).
        correction: weights for answers whose sampler was not quite the policy, by generation.keep_logprobs; None: 1.
        resample: train on answers drawn anew from the rollout, by their scores (Shen and Zhang, 2024: PF-PPO); None: on
            each once.
        old_logprobs: of the policy that sampled: recomputed by its own forward pass, or what the sampler said, which
            saves that pass; in 16 bits the two differ (rollout/logprob_gap), and recomputed is the exact one.
        engine: what samples the answers.
        rows_at_once: sequences measured in one forward pass while collecting; None: all.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (TRL's); 0: none.
        router_aux_loss_over: it is taken over the whole optimiser step (as transformers takes it over a batch), or in
            each sequence (DeepSeek-V3).
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
        entropy_control: AdaptiveEntropy | None = None,
        clip_advantages: Limit | None = None,
        whiten_advantages: Whitening = True,
        reduction: Reduction = "token_mean",
        auxiliary_reduction: Reduction | None = None,
        reduction_length: int | None = None,
        target_kl: float | None = None,
        critic_warmup_steps: int = 0,
        ptx_coef: float = 0.0,
        correction: SamplerCorrection | None = None,
        resample: Resample | None = None,
        old_logprobs: OldLogprobs = "recomputed",
        engine: EngineFactory = HFGenerate,
        rows_at_once: int | None = None,
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        schedule: Schedule = Schedule(),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            policy,
            rewards,
            reference,
            generation,
            updates,
            loss,
            credit,
            shaping,
            kl,
            entropy_coef,
            entropy_control,
            whiten_advantages,
            reduction,
            target_kl,
            ptx_coef,
            rows_at_once,
            optimizer,
            schedule,
            lr_scheduler,
            seed,
            engine=engine,
            old_logprobs=old_logprobs,
            correction=correction,
            clip_advantages=clip_advantages,
            auxiliary_reduction=auxiliary_reduction,
            reduction_length=reduction_length,
            router_aux_loss_coef=router_aux_loss_coef,
            router_aux_loss_over=router_aux_loss_over,
        )
        if not value_coef >= 0:
            raise UserError(f"value_coef={value_coef} would train towards the opposite: give 0 or more")
        if critic_warmup_steps < 0:
            raise UserError(f"critic_warmup_steps={critic_warmup_steps}: give 0 (none) or more")
        if credit.baseline not in ("critic", "none"):
            raise UserError(
                f"credit={type(credit).__name__} compares with something else than PPOModule's critic: use GRPOModule, "
                "or credit=Gae"
            )
        self.save_hyperparameters()
        self.critic_spec = critic
        self.value_loss = value_loss
        self.value_coef = value_coef
        self.critic_warmup_steps = critic_warmup_steps
        self.resample = resample
        self.critic: Critic | None = None

    def inert_options(self) -> Iterable[tuple[str, str]]:
        yield from super().inert_options()
        if self.value_coef == 0:
            yield "value_coef", "0 leaves the critic untrained while its values are used"
        if self.critic_spec.model is None and not self.critic_spec.keep_head:
            yield "critic.keep_head", "the critic starts from no reward model: its head is zeros in any case"
        if self.resample is not None and self.resample.by != "power" and self.resample.power != 2:
            yield "resample.power", f"resample.by is {self.resample.by}"

    @property
    def _has_auxiliary_terms(self) -> bool:
        return True

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

    # ---- collecting ------------------------------------------------------------------------------------------------

    def values_of(self, answered: Answered) -> Tensor:
        policy, critic, answers = self.policy, self.critic, answered.answers
        assert policy is not None
        assert critic is not None
        with gathered_once(policy), gathered_once(critic):
            values = self.measured(answers, lambda part: critic_values(critic, policy, part))
        return torch.where(answers.mask, torch.cat(values).float(), 0.0)

    def choose(self, rollouts: Rollouts, answered: Answered, entropy: Tensor) -> tuple[Rollouts, dict[str, float]]:
        """Everything, each answer once; or by `resample` as often as it was drawn."""
        rollouts, metrics = super().choose(rollouts, answered, entropy)
        if self.resample is None:
            return rollouts, metrics
        scores, counts = rollouts.scores.float(), rollouts.mask.any(-1)
        ends = torch.stack((scores, -scores)).masked_fill(~counts, -torch.inf)
        of_ranks = torch.zeros(self.data_ranks, 2, device=scores.device)
        of_ranks[self.data_rank] = ends.amax(-1)
        best, least = self.add_over_ranks(of_ranks).amax(0)  # a row from each, and zeros from the others
        seed = self._rollout_seed("resample", self._loader.rollouts)
        return rollouts.select(self.resample.draw(scores, counts, best, -least, seed=seed)), metrics

    def rollout_metrics(
        self,
        rollouts: Rollouts,
        scored: ScoredSamples,
        shaped: Shaped,
        entropy: Tensor,
        per_token: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Those of every rollout, and how much of the returns the critic explained before it was trained on them."""
        metrics = super().rollout_metrics(rollouts, scored, shaped, entropy, per_token)
        explained = explained_variance(
            rollouts.values, rollouts.returns, rollouts.mask, add_over_ranks=self.add_over_ranks
        )
        return metrics | {"value/explained_variance": float(explained)}

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Rollouts, batch_idx: int) -> Tensor:
        if not self.takes_part():
            return self.zero_loss()
        assert self.policy is not None
        assert self.critic is not None
        with self.router_balance.heard() as hearing:  # not the critic's routers
            hidden = self.policy.hidden_states(
                batch.tokens, batch.attention_mask, batch.positions, answers=self.shared(batch)
            )
            terms = self.policy_terms(batch, self.policy_scores(batch, hidden))
        values = critic_values(self.critic, self.policy, batch, hidden)
        per_value, value_clipped = self.value_loss(values, batch.values, batch.returns)
        terms["value"] = self.value_coef * self._auxiliary_mean(per_value, batch)
        self.step_means.add(
            {
                "value/loss": per_value,
                "value/clip_frac": value_clipped.float(),
                "value/mean": values,
                "value/return": batch.returns,
            },
            batch.mask,
        )
        self.log_step_means(batch_idx)
        loss = torch.stack(list(terms.values())).sum() + self.router_loss(hearing, batch, batch_idx)
        return loss * self.loss_scale

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Of all gradients together, or with `critic.clip_apart` of each of the groups in `parameter_groups`."""
        groups = optimizer.param_groups
        apart = [[group] for group in groups] if self.critic_spec.clip_apart else [groups]
        try:
            for optimizer.param_groups in apart:  # what is clipped is what the optimiser has
                super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        finally:
            optimizer.param_groups = groups

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.trainer.global_step < self.critic_warmup_steps:
            # no gradient, not a zero one: Adam would still decay and move on its momentum
            assert self.policy is not None
            for parameter in self.policy.parameters():
                parameter.grad = None

    # ---- export ----------------------------------------------------------------------------------------------------

    def export(self, folder: str | Path) -> Path:
        """The policy to `folder`, a separate critic to `folder`/critic."""
        assert self.policy is not None, "nothing to export before the model is built"
        written = export_policy(self.policy, self.tokenizer, folder, card=self.card("Policy trained with PPO"))
        if isinstance(self.critic, ScalarModel):
            export_scalar_model(
                self.critic, self.tokenizer, Path(folder) / "critic", card=self.card("Critic of a PPO policy")
            )
        return written
