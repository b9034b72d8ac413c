"""Online and iterative DPO: pairs out of the policy's own answers, told apart by reward functions; XPO and Nash-MD."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.advantages.pairs import PairRule, Pairs
from rlhf_lightning.advantages.shaping import missing_eos_penalty as lower_unfinished
from rlhf_lightning.core.batches import Batch, Generated, PairRollouts, PromptBatch, concatenate_rows
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PairScores, PreferenceLoss
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.models.body import evaluating
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.mixture import MixtureSpec
from rlhf_lightning.rollout.spec import EngineFactory, GenerationSpec
from rlhf_lightning.stages.answered import Answered
from rlhf_lightning.stages.on_policy import OnPolicyModule
from rlhf_lightning.stages.pair_objective import PairObjective, summed_loss
from rlhf_lightning.stages.pair_scores import measure_pairs
from rlhf_lightning.stages.phases import Phases
from rlhf_lightning.stages.rollout_metrics import answer_metrics
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule


@dataclass(frozen=True)
class Opponent:
    """Another model that draws the second half of the answers to each prompt; each meets one of the policy's own.

        pi(y_t | x, y_<t)^(1 - reference_share) pi_ref(y_t | x, y_<t)^reference_share,   renormalised

    Args:
        reference_share: 1 is the reference itself (XPO); Nash-MD mixes (Munos et al., 2023: 0.125).
    """

    reference_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.reference_share <= 1:
            raise UserError(
                f"opponent.reference_share={self.reference_share} is the reference's share in the mixture: give above "
                "0, to 1, or leave opponent out"
            )


class OnlineDPOModule(OnPolicyModule):
    """Learns preferences between its own answers: sample, score, pair, and train by any preference loss.

        y_1 ... y_K ~ pi(.|x);   (y_w, y_l) = pair rule of their scores;   loss = -log sigma(beta h(y_w, y_l))  (DPO)

    Per batch of prompts `generation.num_samples` answers each; prompts whose answers score the same give no pair. The
    loss is the mean over the pairs of the whole optimiser step, over micro-batches and ranks, as in DPOModule. Large
    batches with several `updates.num_minibatches` are iterative DPO, small ones online DPO.

    Args:
        policy: the model to train.
        rewards: functions that score answers, with their weights: a trained reward model, a verifier, rules.
        loss: the preference loss; XPO and NashMD want an opponent.
        pairs: which of a prompt's answers are compared.
        opponent: another model that draws half of the answers; None: the policy draws them all.
        reference: the model that the policy is compared with; None: the policy as it was at the start. Losses that need
            none build none.
        reference_sync: let the reference follow the policy; None: it stays. Iterative DPO renews it with every round.
        missing_eos_penalty: subtracted from the score of answers that hit the length limit.
        generation: how answers are sampled.
        updates: inner epochs and minibatches of each batch of pairs.
        engine: what samples the policy's answers; an opponent's come from HFGenerate.
        rows_at_once: sequences measured in one forward pass in validation; None: all.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (TRL's); 0: none.
        router_aux_loss_over: it is taken over the whole optimiser step (as transformers takes it over a batch), or in
            each sequence (DeepSeek-V3).
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of sampling, of pairs that are drawn and of minibatch order; None: the run's.

    References:
        Guo et al., Direct Language Model Alignment from Online AI Feedback, 2024. arXiv:2402.04792
        Dong et al., RLHF Workflow: From Reward Modeling to Online RLHF, 2024. arXiv:2405.07863
        Xie et al., Exploratory Preference Optimization (XPO), 2024. arXiv:2405.21046
        Munos et al., Nash Learning from Human Feedback (Nash-MD), 2023. arXiv:2312.00886
    """

    rollout_kind = PairRollouts
    denominator = "pairs"
    changed_by_steps = ("step_means", "objective")

    def __init__(
        self,
        policy: ModelSpec,
        rewards: list[WeightedReward],
        loss: PreferenceLoss = DPO(),
        pairs: PairRule = PairRule(),
        opponent: Opponent | None = None,
        reference: ModelSpec | None = None,
        reference_sync: ReferenceSync | None = None,
        missing_eos_penalty: float = 0.0,
        generation: GenerationSpec = GenerationSpec(num_samples=4),
        updates: UpdateSpec = UpdateSpec(inner_epochs=1),
        engine: EngineFactory = HFGenerate,
        rows_at_once: int | None = None,
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6),
        schedule: Schedule = Schedule(),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        if updates.async_rollouts:
            raise UserError(
                "updates.async_rollouts=true weighs answers of an older policy, and a preference loss has no such "
                "weight: leave it out, or use GRPOModule or PPOModule"
            )
        needs_reference = "reference" in loss.needs or opponent is not None
        super().__init__(
            policy,
            rewards,
            reference if needs_reference else None,
            generation,
            updates,
            rows_at_once,
            optimizer,
            schedule,
            lr_scheduler,
            seed,
            engine=engine,
            use_reference=needs_reference,
            reference_sync=reference_sync if needs_reference else None,
            router_aux_loss_coef=router_aux_loss_coef,
            router_aux_loss_over=router_aux_loss_over,
        )
        if generation.num_samples < 2:
            raise UserError(
                f"generation.num_samples={generation.num_samples} leaves nothing to compare an answer with: sample at "
                "least 2, 4 to 8 is usual"
            )
        if opponent is not None and generation.num_samples % 2:
            raise UserError(
                f"generation.num_samples={generation.num_samples} cannot be shared between the policy and its "
                "opponent, half each: give an even number"
            )
        if not missing_eos_penalty >= 0:
            raise UserError(f"missing_eos_penalty={missing_eos_penalty} would pay for not ending: give 0 or more")
        if "drawn_pairs" in loss.needs:
            raise UserError(
                f"keep_frac below 1 of {type(loss).__name__} draws among records: set keep_frac: 1, or use DPOModule"
            )
        if "gold" in loss.needs:
            raise UserError(
                f"{type(loss).__name__} reads a gold answer to each prompt, and sampled pairs have none: use DPOModule"
            )
        if "opponent" in loss.needs and opponent is None:
            raise UserError(
                f"{type(loss).__name__} compares the policy's answers with another model's, and there is no opponent: "
                "set opponent: {reference_share: 1.0} (the reference) or less (a mixture)"
            )
        self.save_hyperparameters()
        self.loss = loss
        self.pair_rule = pairs
        self.opponent = opponent
        self.missing_eos_penalty = missing_eos_penalty
        self._unused = {"reference": reference, "reference_sync": reference_sync} if not needs_reference else {}

    @property
    def loss(self) -> PreferenceLoss:
        """What is minimised."""
        return self.objective.loss

    @loss.setter
    def loss(self, loss: PreferenceLoss) -> None:
        self.objective = PairObjective(loss)

    def inert_options(self) -> Iterable[tuple[str, str]]:
        yield from super().inert_options()
        for name, given in self._unused.items():
            if given is not None:
                yield name, f"the loss {type(self.loss).__name__} needs no reference"
        if self.opponent is not None and self.pair_rule != PairRule():
            yield "pairs", "with an opponent each answer of the policy meets one of the opponent's"

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.objective.warn_of_cuts(self.trainer.accumulate_grad_batches * self.data_ranks)

    # ---- collecting ------------------------------------------------------------------------------------------------

    def sample(self, prompts: PromptBatch) -> Generated:
        """The policy's answers to each prompt, and behind them the opponent's."""
        if self.opponent is None:
            return super().sample(prompts)
        each = self.generation.num_samples // 2
        index = self._loader.drawn - 1
        spec = replace(self.generation, num_samples=each)
        own = self.generate(prompts, self._rollout_seed("rollout", index), spec)
        other = self._answers_of(self.opponent, spec, prompts, self._rollout_seed("opponent", index))
        # what two samplers say about themselves cannot be joined, and nobody asks
        own, other = (replace(part, kept=None, sampler_logprobs=None, sampler_entropy=None) for part in (own, other))
        rows = torch.arange(len(own.tokens) + len(other.tokens), device=own.tokens.device)
        # all of the one, then all of the other -> prompt by prompt
        order = rows.view(2, -1, each).transpose(0, 1).flatten()
        return concatenate_rows((own, other), pad_id=self.tokenizer.pad_token_id).select(order)

    def _answers_of(self, opponent: Opponent, spec: GenerationSpec, prompts: PromptBatch, seed: int) -> Generated:
        assert self.reference is not None
        if opponent.reference_share == 1:
            with self.reference.as_it_was():
                return HFGenerate(spec, self.tokenizer).generate(self.reference.policy, prompts, seed=seed)
        mixture = MixtureSpec(self.reference, opponent.reference_share)
        return HFGenerate(spec, self.tokenizer).with_mixture(mixture).generate(self.policy, prompts, seed=seed)

    def prepare(self, answered: Answered, phase: Phases) -> tuple[PairRollouts, dict[str, float]]:
        """Pairs of the answers, and what they and the policy's own answers looked like."""
        answers, scored = answered.answers, answered.scored
        own = self._drawn_by_the_policy(len(answers.tokens))
        pairs = self._pairs(answered)
        rows = torch.stack((pairs.chosen, pairs.rejected), dim=-1)  # [pairs, 2]
        found = len(rows) > 0
        if not found:
            rows = torch.tensor([[0, 1]], device=self.device)
        rollouts = PairRollouts(
            tokens=answers.tokens[rows],
            attention_mask=answers.attention_mask[rows],
            # a pair that only fills a place has tokens too: a loss of nothing need not be finite
            mask=(answers.mask if found else answers.attention_mask)[rows],
            positions=answers.positions[rows],
            margins=pairs.margins if found else torch.ones(1, device=self.device),
            own=own[rows],
            counts_in_loss=torch.full((len(rows),), found, device=self.device),
        )
        of_policy = own.nonzero()[:, 0]
        metrics = answer_metrics(answers.select(of_policy), scored.select(of_policy.tolist()), self.add_over_ranks)
        return rollouts, metrics | self._pair_metrics(answered, pairs, own)

    def _drawn_by_the_policy(self, num_answers: int) -> Tensor:
        rows = torch.arange(num_answers, device=self.device)
        each = self.generation.num_samples
        return rows % each < (each if self.opponent is None else each // 2)

    def _pairs(self, answered: Answered) -> Pairs:
        answers, groups = answered.answers, answered.groups
        rows = torch.arange(len(groups), device=groups.device)
        if self.opponent is not None:
            each = self.generation.num_samples // 2
            met = rows // (2 * each) * each + rows % each
            groups = torch.where(answered.scored.counts.to(groups.device), met, len(rows) + rows)
        scores = lower_unfinished(
            answered.scored.total.to(self.device).float(), answers.finished, subtract=self.missing_eos_penalty
        )
        lots = torch.rand(
            len(rows), generator=torch.Generator().manual_seed(self._rollout_seed("pairs", self._loader.rollouts))
        )
        return self.pair_rule(scores, groups, lengths=answers.mask.sum(-1), lots=lots.to(self.device))

    def _pair_metrics(self, answered: Answered, pairs: Pairs, own: Tensor) -> dict[str, float]:
        """What the pairs looked like, over all ranks."""
        lengths = answered.answers.mask.sum(-1)
        per_pair = {
            "pairs/margin": pairs.margins,
            "pairs/chosen_length": lengths[pairs.chosen],
            "pairs/rejected_length": lengths[pairs.rejected],
        }
        possible = len(answered.prompts.tokens)
        more = [0.0, 0.0]
        if self.opponent is not None:
            possible *= self.generation.num_samples // 2
            per_pair["pairs/own_wins_frac"] = own[pairs.chosen]
            theirs = ~own & answered.scored.counts.to(own.device)
            scores = answered.scored.total.to(own.device)
            more = [float(scores[theirs].sum()), float(theirs.sum())]
        sums = [float(values.double().sum()) for values in per_pair.values()]
        vector = torch.tensor([*sums, *more, len(pairs.margins), possible], dtype=torch.float64)
        *totals, score, answers, found, asked = self.add_over_ranks(vector).tolist()
        metrics = {name: total / max(found, 1) for name, total in zip(per_pair, totals, strict=True)}
        metrics |= {"pairs/trained": found, "pairs/found_frac": found / max(asked, 1)}
        if self.opponent is not None:
            metrics["pairs/opponent_score"] = score / max(answers, 1)
        return metrics

    # ---- training --------------------------------------------------------------------------------------------------

    def _measured(self, batch: PairRollouts) -> PairScores:
        assert self.policy is not None
        scores, _ = measure_pairs(
            self.policy,
            self.reference,
            batch.as_pairs(),
            self.loss.needs,
            pad_id=self.tokenizer.pad_token_id,
            running=self.objective.running,
        )
        return replace(scores, own=batch.own)

    def measure_step(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Sums of what the loss wants the mean of over the step, from the policy as it is before the step."""
        known = super().measure_step(batches)
        sums = self.objective.no_sums()
        if not sums:
            return known
        assert self.policy is not None
        with torch.no_grad(), evaluating(self.policy), self.trainer.precision_plugin.forward_context():
            for batch in cast(Sequence[PairRollouts], batches):
                here = batch.to(self.device)
                for of_part in self.splitter.results(here, self._sums_of):
                    sums = {name: value + of_part[name] for name, value in sums.items()}
        return {**known, **sums}

    def _sums_of(self, batch: PairRollouts) -> dict[str, float]:
        return self.objective.sums(self._measured(batch), batch.counts_in_loss)

    def inseparable(self) -> str | None:
        return self.objective.inseparable

    def training_step(self, batch: PairRollouts, batch_idx: int) -> Tensor:
        self.log_pending()
        if self._step_is_empty:
            return self.zero_loss()
        with self.router_balance.heard() as hearing:
            pairs = self._measured(batch)
        counts = batch.counts_in_loss
        as_pairs = batch.as_pairs()
        output = self.objective(pairs, as_pairs)
        self.objective.count(self.step_means, pairs, output, counts)
        self.objective.count_statistics(output, counts)
        if self.ends_step(batch_idx):
            metrics = summed_loss(self.step_means.take(self.add_over_ranks), "train/loss")
            shown = ("train/loss", "rewards/accuracies")
            self.log_dict({k: v for k, v in metrics.items() if k in shown}, prog_bar=True, batch_size=1)
            self.log_dict({k: v for k, v in metrics.items() if k not in shown}, batch_size=1)
            self.objective.end_step(self.add_over_ranks)
        loss = self.objective.share(output, as_pairs, counts) + self.router_loss(hearing, batch, batch_idx)
        return loss * self.loss_scale

    # ---- state and export ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["running_means"] = self.objective.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.objective.load_state_dict(checkpoint.get("running_means", {}))

    def export(self, folder: str | Path) -> Path:
        """The policy to `folder`."""
        assert self.policy is not None, "nothing to export before the model is built"
        return export_policy(self.policy, self.tokenizer, folder, card=self.card("Policy trained with online DPO"))
