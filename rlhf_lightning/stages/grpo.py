"""GRPO and its family: credit from groups of answers instead of a critic, filters on what is trained on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.advantages.answers import informative_answers, mean_is_within
from rlhf_lightning.advantages.group import GroupNormalised
from rlhf_lightning.advantages.kl_control import FixedKL
from rlhf_lightning.advantages.shaping import Limit, overlong_mask
from rlhf_lightning.core.batches import Generated, PromptBatch, Rollouts, concatenate_rows
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Credit, PolicyLoss, PolicyLossOutput, Sample
from rlhf_lightning.core.logprobs import TokenScores, log_collision
from rlhf_lightning.core.masked import Reduction
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.losses.correction import SamplerCorrection, off_policy_sequence_mask
from rlhf_lightning.losses.entropy import top_entropy_mask
from rlhf_lightning.losses.entropy_control import AdaptiveEntropy
from rlhf_lightning.losses.policy import ClippedSurrogate
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.sharded import gathered_once
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.prefix import PrefixSpec, with_prefixes, without_prefixes
from rlhf_lightning.rollout.replay import ReplayBuffer, ReplaySpec
from rlhf_lightning.rollout.spec import EngineFactory, GenerationSpec
from rlhf_lightning.stages.answered import Answered, without_dropped
from rlhf_lightning.stages.on_policy import OldLogprobs
from rlhf_lightning.stages.phases import Phases
from rlhf_lightning.stages.policy_gradient import PolicyGradientModule, Whitening
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule


@dataclass(frozen=True)
class DynamicSampling:
    """Draws further prompts until a rollout is full of groups whose answers differ in score.

    Args:
        max_batches: batches of prompts drawn for one rollout at most; what was found by then is trained on.
        by: reward function whose scores have to differ (DAPO: correctness); null: the weighted sum.
        at_least: by how much the best and the worst of a group differ, at least; 0: at all.
        mean_within: keep groups whose mean score lies between these two, ends excluded, instead of those that differ
            (OpenRLHF's dynamic_filtering_range, [0, 1]); for scores of 0 and 1 the same, and a group of equal scores in
            between is kept too.
    References:
        Yu et al., DAPO, 2025, eq. 11. arXiv:2503.14476
    """

    max_batches: int = 8
    by: str | None = None
    at_least: float = 0.0
    mean_within: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.mean_within is not None and not self.mean_within[0] < self.mean_within[1]:
            raise UserError(
                f"dynamic_sampling.mean_within={list(self.mean_within)} holds nothing: give [low, high], such as [0, 1]"
            )
        if self.mean_within is not None and self.at_least:
            raise UserError(
                f"dynamic_sampling.at_least={self.at_least} asks for scores that differ, and mean_within keeps groups "
                "by their mean: drop one"
            )
        if self.max_batches < 2:
            raise UserError(
                f"dynamic_sampling.max_batches={self.max_batches} leaves nothing to draw again: give at least 2, or "
                "leave dynamic_sampling out"
            )


class GRPOModule(PolicyGradientModule):
    """Group-relative policy optimisation: an answer is credited by how it compares with others to the same prompt.

        A_i  = (score_i - mean of its group) / (standard deviation of its group + floor)        or another `credit`
        loss = reduce_t weight_t clipped_surrogate_t + kl.loss_coef reduce_t kl_t - entropy_coef reduce_t entropy_t

    No critic. The family is a choice of `credit`, `loss` and `reduction`: Dr.GRPO, DAPO, GSPO, CISPO, RLOO,
    REINFORCE++, ReMax and others are rows of the table in docs/grpo.md. The reduction runs over the whole optimiser
    step, over micro-batches and ranks.

    Args:
        policy: the model to train.
        rewards: functions that score answers, with their weights: a verifier, a trained reward model, rules.
        reference: the model that KL is measured against; None: the policy as it was at the start.
        use_reference: false builds no reference (DAPO, Dr.GRPO): no second copy of the weights, and no KL is measured.
        reference_sync: let the reference follow the policy (Gorbatovski et al., 2024); None: it stays.
        generation: how answers are sampled; num_samples is the size of a group.
        updates: inner epochs and minibatches.
        loss: the policy's loss per token.
        credit: scores to advantages.
        shaping: what happens to scores before they become rewards.
        kl: the KL penalty: in the loss (Shao et al., 2024), in the reward, or none.
        entropy_coef: weight of the entropy bonus.
        entropy_control: moves that weight, so that entropy does not fall below a target (He et al., 2025); None: it
            stays.
        entropy_top_frac: share of the tokens, those of highest entropy, that carry the policy's loss; 1: all (Wang et
            al., 2025: 0.2).
        clip_advantages: how far the credit's advantages may go, c for -c to c or both ends; None: as far as they go.
        whiten_advantages: scale advantages once more, over the tokens of the rollout; mean: to mean 0 alone; sample:
            squares divided by n - 1, not n.
        reduction: what the policy's loss is averaged over.
        reduction_length: what `fixed_length` divides by; None: generation.max_new_tokens.
        auxiliary_reduction: what KL and entropy are averaged over; None: the same (OpenRLHF: always token_mean).
        dynamic_sampling: draw prompts until enough groups differ in score; None: take groups as they come.
        drop_uninformative: groups whose scores are all equal carry no loss and count in no denominator; false: they
            count, with an advantage of 0.
        mask_truncated: answers cut off at the length limit carry no loss (Yu et al., 2025: overlong filtering).
        replay: groups kept to stand in for those that teach nothing; None: no buffer.
        correction: weights for answers whose sampler was not quite the policy, by generation.keep_logprobs; None: 1.
        off_policy_threshold: bad answers that the policy has moved away from by more than this (nats per token, mean)
            carry no loss (DeepSeek-AI, 2025: DeepSeek-V3.2); None: they do.
        prefix: let a share of the answers begin with given words that carry no loss; None: answers begin themselves.
        renormalise_truncated: of a sampler that truncates (top_p, top_k, min_p), take log-probabilities over what it
            kept, which makes ratios exact; false: over the whole vocabulary, as other libraries do.
        old_logprobs: of the policy that sampled: recomputed by its own forward pass, or what the sampler said, which
            saves that pass; in 16 bits the two differ (rollout/logprob_gap), and recomputed is the exact one.
        target_kl: no more optimiser steps on a rollout once the policy has moved this far (nats per token).
        ptx_coef: weight of the likelihood of a second source, data.pretraining.
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
        Shao et al., DeepSeekMath, 2024. arXiv:2402.03300
        Liu et al., Understanding R1-Zero-Like Training (Dr.GRPO), 2025. arXiv:2503.20783
        Yu et al., DAPO, 2025. arXiv:2503.14476
    """

    def __init__(
        self,
        policy: ModelSpec,
        rewards: list[WeightedReward],
        reference: ModelSpec | None = None,
        use_reference: bool = True,
        reference_sync: ReferenceSync | None = None,
        generation: GenerationSpec = GenerationSpec(num_samples=8),
        updates: UpdateSpec = UpdateSpec(inner_epochs=1),
        loss: PolicyLoss = ClippedSurrogate(),
        credit: Credit = GroupNormalised(),
        shaping: RewardShaping = RewardShaping(),
        kl: KLSpec = KLSpec(control=FixedKL(0.0), loss_coef=0.04),
        entropy_coef: float = 0.0,
        entropy_control: AdaptiveEntropy | None = None,
        entropy_top_frac: float = 1.0,
        clip_advantages: Limit | None = None,
        whiten_advantages: Whitening = False,
        reduction: Reduction = "sequence_mean",
        auxiliary_reduction: Reduction | None = None,
        reduction_length: int | None = None,
        dynamic_sampling: DynamicSampling | None = None,
        drop_uninformative: bool = False,
        mask_truncated: bool = False,
        replay: ReplaySpec | None = None,
        correction: SamplerCorrection | None = None,
        off_policy_threshold: float | None = None,
        prefix: PrefixSpec | None = None,
        renormalise_truncated: bool = True,
        old_logprobs: OldLogprobs = "recomputed",
        target_kl: float | None = None,
        ptx_coef: float = 0.0,
        engine: EngineFactory = HFGenerate,
        rows_at_once: int | None = None,
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6),
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
            use_reference=use_reference,
            reference_sync=reference_sync,
            renormalise_truncated=renormalise_truncated,
            old_logprobs=old_logprobs,
            correction=correction,
            clip_advantages=clip_advantages,
            auxiliary_reduction=auxiliary_reduction,
            reduction_length=reduction_length,
            router_aux_loss_coef=router_aux_loss_coef,
            router_aux_loss_over=router_aux_loss_over,
        )
        if not 0 < entropy_top_frac <= 1:
            raise UserError(f"entropy_top_frac={entropy_top_frac} is no share of the tokens: give 0.2, or 1 for all")
        self.save_hyperparameters()
        if off_policy_threshold is not None and not off_policy_threshold > 0:
            raise UserError(f"off_policy_threshold={off_policy_threshold}: give a positive number, as 0.5, or null")
        _check_groups(credit, generation, dynamic_sampling, drop_uninformative, replay)
        _check_reference(use_reference, kl)
        self.entropy_top_frac = entropy_top_frac
        self.dynamic_sampling = dynamic_sampling
        self.drop_uninformative = drop_uninformative
        self.mask_truncated = mask_truncated
        self.replay_spec = replay
        self.off_policy_threshold = off_policy_threshold
        self.prefix = prefix
        self.replay: ReplayBuffer | None = None
        self._saved_replay: Sequence[Mapping[str, Any]] | None = None

    def inert_options(self) -> Iterable[tuple[str, str]]:
        yield from super().inert_options()
        sampling = self.dynamic_sampling
        if self.drop_uninformative and sampling is not None and sampling.by is None and sampling.mean_within is None:
            yield "drop_uninformative", "dynamic_sampling keeps no such groups"
        if not self.renormalise_truncated and not self.generation.truncates:
            yield "renormalise_truncated", "generation cuts no tokens off: set top_p, top_k or min_p, or leave it out"
        if self.mask_truncated and self.shaper.shaping.missing_eos_penalty:
            yield "shaping.missing_eos_penalty", "mask_truncated takes the loss off the answers that it punishes"

    def configure_model(self) -> None:
        super().configure_model()
        if self.entropy_top_frac < 1 and self.old_logprobs == "sampler" and not self.engine.says_entropy:
            raise UserError(
                f"entropy_top_frac={self.entropy_top_frac} needs the entropy of every token, which "
                f"{type(self.engine).__name__} does not say: set old_logprobs: recomputed, or entropy_top_frac: 1"
            )
        if self.replay_spec is not None and self.replay is None:
            pad = self.tokenizer.pad_token_id
            self.replay = ReplayBuffer(
                self.replay_spec, pad_id=pad, seed=counter_seed(self.seed, "replay", self.data_rank)
            )
            if self._saved_replay is not None:
                self.replay.load_state_dict(self._saved_replay[self.global_rank])

    # ---- collecting ------------------------------------------------------------------------------------------------

    def answer(self, draw: Callable[[], PromptBatch], phase: Phases) -> Answered:
        first = self._answer_once(draw, phase)
        return first if self.dynamic_sampling is None else self._sample_on(first, draw, phase, self.dynamic_sampling)

    def draw_prompts(self, draw: Callable[[], PromptBatch]) -> PromptBatch:
        prompts = super().draw_prompts(draw)
        if self.prefix is None:
            return prompts
        seed = self._rollout_seed("prefix", self._loader.drawn - 1)
        return with_prefixes(prompts, self.prefix, self.tokenizer, seed=seed)

    def samples(self, prompts: PromptBatch, answers: Generated) -> list[Sample]:
        if self.prefix is not None and self.prefix.in_completion:
            prompts = without_prefixes(prompts, self.tokenizer)
        return super().samples(prompts, answers)

    def _answer_once(self, draw: Callable[[], PromptBatch], phase: Phases) -> Answered:
        answered = super().answer(draw, phase)
        if self.credit.baseline != "greedy":
            return answered
        with phase("greedy"):
            return self._with_greedy(answered)

    def _with_greedy(self, answered: Answered) -> Answered:
        """Each answer beside the score of the greedy one to its prompt; dropped where that could not be scored."""
        spec = replace(self.generation, temperature=0.0, num_samples=1, keep_logprobs=False)
        greedy = self.generate(answered.prompts, 0, spec)
        copies = self.generation.num_samples
        compared = self.score(answered.prompts, greedy)
        scored = answered.scored
        if compared.valid is not None:
            scored = scored.keeping(compared.valid.repeat_interleave(copies))
        baseline = compared.total.to(self.device).repeat_interleave(copies)
        return replace(answered, answers=without_dropped(answered.answers, scored), scored=scored, baseline=baseline)

    def _sample_on(
        self, first: Answered, draw: Callable[[], PromptBatch], phase: Phases, spec: DynamicSampling
    ) -> Answered:
        """Further prompts until as many groups differ in score as the first batch had, on every rank."""
        wanted = first.prompts.tokens.shape[0]
        drawn, found = [first], [self._informative(first, spec)]
        while len(drawn) < spec.max_batches:
            short = sum(_count_groups(part.groups[rows]) for part, rows in zip(drawn, found, strict=True)) < wanted
            # one rank that is short keeps all of them drawing: each draw has collective operations in it
            if not float(self.add_over_ranks(torch.tensor([float(short)]))):
                break
            drawn.append(self._answer_once(draw, phase))
            found.append(self._informative(drawn[-1], spec))
        sampled, scores = sum(len(part.groups) for part in drawn), sum(float(p.scored.total.sum()) for p in drawn)
        kept = _join_groups(drawn, found, wanted, pad_id=self.tokenizer.pad_token_id)
        here = [sampled, scores, sum(float(rows.sum()) for rows in found), float(kept.answers.mask.any(-1).sum())]
        sampled, scores, informative, used = self.add_over_ranks(torch.tensor(here, dtype=torch.float64)).tolist()
        metrics = {
            "sampling/batches": float(len(drawn)),
            "sampling/score": scores / sampled,
            "sampling/informative_frac": informative / sampled,
            "sampling/used_frac": used / sampled,
        }
        return replace(kept, metrics=metrics)

    def _informative(self, answered: Answered, spec: DynamicSampling) -> Tensor:
        """True for answers of groups that dynamic sampling keeps [batch]."""
        scores = answered.scored.total if spec.by is None else _scores_of(answered.scored, spec.by)
        scores = scores.to(answered.groups.device).float()
        counts = answered.answers.mask.any(-1)
        if spec.mean_within is not None:
            return mean_is_within(scores, answered.groups, *spec.mean_within) & counts
        return informative_answers(scores, answered.groups, at_least=spec.at_least) & counts

    def values_of(self, answered: Answered) -> Tensor:
        """What the credit's `baseline` says: the greedy answer's score spread over the tokens, or how far each token's
        gradient varies; else 0."""
        mask = answered.answers.mask
        if self.credit.baseline == "variance":
            return self._gradient_variance(answered.answers)
        if answered.baseline is None:
            return torch.zeros(mask.shape, device=mask.device)
        return torch.where(mask, (answered.baseline / mask.sum(-1).clamp(min=1))[:, None], 0.0)

    def _gradient_variance(self, answers: Generated) -> Tensor:
        """1 - 2 pi(token) + sum_v pi(v)^2 at every token of the answers, over what it was sampled from."""
        policy, temperature = self.policy, self.generation.temperature
        assert policy is not None

        def variance(part: Generated) -> Tensor:
            hidden = policy.hidden_states(part.tokens, part.attention_mask, part.positions, answers=self.shared(part))
            own, sharper = (
                policy.scores(hidden, part.tokens, part.mask, temperature=at, kept=part.kept).logprobs
                for at in (temperature, 0.5 * temperature)
            )
            return 1 - 2 * own.exp() + log_collision(own, sharper).exp()

        with torch.no_grad(), gathered_once(policy):  # ranks may have different numbers of parts
            parts = self.measured(answers, variance)
        return torch.where(answers.mask, torch.cat(parts).float(), 0.0)

    def choose(self, rollouts: Rollouts, answered: Answered, entropy: Tensor) -> tuple[Rollouts, dict[str, float]]:
        """Which tokens carry the loss, and which groups stand in for which."""
        mask, counted = rollouts.mask, rollouts.mask.any(-1)
        informative = informative_answers(rollouts.scores, rollouts.groups) & counted
        everything = float(counted.sum())
        rollouts, metrics = self._weighted(rollouts, answered, entropy)
        if self.mask_truncated:
            mask = overlong_mask(mask, rollouts.finished)
        if self.drop_uninformative:
            mask = mask & informative[:, None]
        rollouts = replace(rollouts, mask=mask)
        replayed = 0
        if self.replay is not None:
            useful = informative & mask.any(-1)
            rollouts, replayed = self.replay.exchange(rollouts, useful, rollout=self._loader.rollouts)
        here = [everything, float(informative.sum()), float(rollouts.mask.any(-1).sum()), float(replayed)]
        answers, informed, trained, replayed_everywhere = self.add_over_ranks(
            torch.tensor(here, dtype=torch.float64)
        ).tolist()
        metrics |= {"groups/informative_frac": informed / max(answers, 1), "groups/trained_sequences": trained}
        if self.replay is not None:
            metrics["groups/replayed"] = replayed_everywhere
        return rollouts, metrics

    def _weighted(self, rollouts: Rollouts, answered: Answered, entropy: Tensor) -> tuple[Rollouts, dict[str, float]]:
        """What the loss of each token is multiplied by: its part in the policy gradient, and its sampler's mistake."""
        if self.entropy_top_frac < 1:
            top = top_entropy_mask(entropy, rollouts.mask, self.entropy_top_frac, add_over_ranks=self.add_over_ranks)
            rollouts = replace(rollouts, weights=top.to(rollouts.advantages))
        return self._corrected(rollouts, answered)

    # ---- training --------------------------------------------------------------------------------------------------

    def policy_loss(self, batch: Rollouts, scores: TokenScores) -> PolicyLossOutput:
        output = super().policy_loss(batch, scores)
        if self.off_policy_threshold is None:
            return output
        kept = off_policy_sequence_mask(
            scores.logprobs, batch.old_logprobs, batch.advantages, batch.mask, threshold=self.off_policy_threshold
        )
        self.step_means.add({"policy/off_policy_frac": (~kept).float()}, batch.mask)
        return replace(output, per_token=torch.where(kept, output.per_token, 0.0))

    def training_step(self, batch: Rollouts, batch_idx: int) -> Tensor:
        if not self.takes_part():
            return self.zero_loss()
        assert self.policy is not None
        with self.router_balance.heard() as hearing:
            hidden = self.policy.hidden_states(
                batch.tokens, batch.attention_mask, batch.positions, answers=self.shared(batch)
            )
            terms = self.policy_terms(batch, self.policy_scores(batch, hidden))
        self.log_step_means(batch_idx)
        loss = torch.stack(list(terms.values())).sum() + self.router_loss(hearing, batch, batch_idx)
        return loss * self.loss_scale

    # ---- state and export ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.replay is not None:
            checkpoint["replay"] = self._of_all_ranks(self.replay.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._saved_replay = checkpoint.get("replay")
        if self.replay is not None and self._saved_replay is not None:
            self.replay.load_state_dict(self._saved_replay[self.global_rank])

    def export(self, folder: str | Path) -> Path:
        """The policy to `folder`."""
        assert self.policy is not None, "nothing to export before the model is built"
        return export_policy(self.policy, self.tokenizer, folder, card=self.card("Policy trained with GRPO"))


def _check_groups(
    credit: Credit,
    generation: GenerationSpec,
    dynamic_sampling: DynamicSampling | None,
    drop_uninformative: bool,
    replay: ReplaySpec | None,
) -> None:
    if credit.baseline == "critic":
        raise UserError(
            f"credit={type(credit).__name__} compares with a critic, which GRPOModule does not have: use PPOModule, or "
            "a credit such as GroupNormalised"
        )
    asking = [f"credit={type(credit).__name__}"] if credit.needs_groups else []
    asking += ["dynamic_sampling"] if dynamic_sampling is not None else []
    asking += ["drop_uninformative=true"] if drop_uninformative else []
    asking += ["replay"] if replay is not None else []
    if asking and generation.num_samples == 1:
        raise UserError(
            f"generation.num_samples=1 gives groups of one answer, and {asking[0]} compares the answers of a group: "
            "sample at least 2, 8 is usual"
        )


def _check_reference(use_reference: bool, kl: KLSpec) -> None:
    if use_reference:
        return
    coefs = {"kl.loss_coef": kl.loss_coef, "kl.control's coefficient": kl.control.initial_coef}
    for name, value in coefs.items():
        if value:
            raise UserError(
                f"{name}={value} needs a reference, and use_reference is false: set it to 0, or use_reference to true"
            )


def _scores_of(scored: ScoredSamples, name: str) -> Tensor:
    everything = scored.breakdown | scored.parts
    if name not in everything:
        raise UserError(
            f"dynamic_sampling.by={name!r} is none of the rewards, which are {', '.join(map(repr, everything))}: "
            "name one of them, or leave it out for their sum"
        )
    return everything[name]


def _count_groups(groups: Tensor) -> int:
    return len(groups.unique())


def _join_groups(drawn: list[Answered], found: list[Tensor], wanted: int, *, pad_id: int) -> Answered:
    """The first `wanted` of the groups that were found, numbered anew; where there is none, one answer, dropped."""
    parts, left = [], wanted
    for answered, rows in zip(drawn, found, strict=True):
        names = answered.groups[rows].unique()[:left]  # sorted: in the order of the prompts
        chosen = torch.isin(answered.groups, names) & rows
        if chosen.any():
            parts.append(answered.select(chosen.nonzero()[:, 0], first_group=wanted - left))
            left -= len(names)
    if not parts:
        empty = drawn[0].select(torch.zeros(1, dtype=torch.long, device=drawn[0].groups.device), first_group=0)
        mask = torch.zeros_like(empty.answers.mask)
        parts = [
            replace(
                empty, answers=replace(empty.answers, mask=mask), scored=empty.scored.keeping(torch.tensor([False]))
            )
        ]
    baselines = [part.baseline for part in parts if part.baseline is not None]
    return Answered(
        prompts=drawn[0].prompts,
        answers=concatenate_rows([part.answers for part in parts], pad_id=pad_id),
        scored=ScoredSamples.joined([part.scored for part in parts]),
        groups=torch.cat([part.groups for part in parts]),
        staleness=torch.cat([part.staleness for part in parts]),
        baseline=torch.cat(baselines) if baselines else None,
    )
