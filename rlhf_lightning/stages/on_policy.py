"""The rollout loop: prompts to scored answers to minibatches, under Lightning's automatic optimisation.

Knows no algorithm. A stage says what becomes of scored answers (`prepare`) and gives a `training_step`.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn

from rlhf_lightning.core.batches import AnswerRollouts, Batch, Generated, PromptBatch, Rollouts, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.failpoints import failpoint
from rlhf_lightning.core.interfaces import RolloutEngine, Sample
from rlhf_lightning.core.logprobs import TokenScores
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import Reference, ReferenceSync, make_reference
from rlhf_lightning.models.sharded import gathered_once, is_sharded, root_of
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward, score_samples, unscored
from rlhf_lightning.rewards.readers import readers_of
from rlhf_lightning.rollout.ahead import Ahead
from rlhf_lightning.rollout.engines import truncating_options
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.loader import AnyRollouts, RolloutLoader, UpdateSpec, buffer_to_dict
from rlhf_lightning.rollout.samples import decode_samples
from rlhf_lightning.rollout.spec import EngineFactory, GenerationSpec
from rlhf_lightning.stages.answered import Answered, without_dropped
from rlhf_lightning.stages.base import RLHFModule
from rlhf_lightning.stages.phases import Phases, tell
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule
from rlhf_lightning.stages.splitting import told

logger = logging.getLogger(__name__)

OldLogprobs = Literal["recomputed", "sampler"]
Measured = TypeVar("Measured")


class OnPolicyModule(RLHFModule):
    """Samples, scores and trains on its own answers.

    One epoch is one pass over the prompts. For every batch of prompts: `collect` samples `generation.num_samples`
    answers each, scores them, and prepares them for training (`prepare`); then `updates.inner_epochs` passes of
    `updates.num_minibatches` optimiser steps train on them.

    Args:
        policy: the model to train.
        rewards: functions that score answers, with their weights.
        reference: the model that KL is measured against; None: the policy as it was at the start.
        generation: how answers are sampled.
        updates: how often and in what pieces rollouts are trained on.
        rows_at_once: sequences measured in one forward pass while collecting; None: all.
        optimizer, schedule, lr_scheduler, seed, router_aux_loss_coef, router_aux_loss_over: as for every stage.
        engine: what samples.
        use_reference: whether a reference is built at all; without one no KL is measured.
        reference_sync: let the reference follow the policy; None: it stays.
        renormalise_truncated: of a sampler that truncates, take log-probabilities over what it kept.
        old_logprobs: of the policy that sampled: recomputed by its own forward pass, or what the sampler said.
    """

    batch_format = "prompts"
    rollout_kind: ClassVar[type[AnyRollouts]] = Rollouts
    """What `collect` gives: sequences, or pairs."""
    learns_from_scores: ClassVar[bool] = True
    """Whether it is reward functions that say what is learnt, from how answers to a prompt differ."""
    denominator: ClassVar[str] = "tokens"
    """The count without which an optimiser step has nothing in it to learn from."""

    def __init__(
        self,
        policy: ModelSpec,
        rewards: list[WeightedReward],
        reference: ModelSpec | None,
        generation: GenerationSpec,
        updates: UpdateSpec,
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
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
    ) -> None:
        super().__init__(
            policy,
            optimizer,
            schedule,
            lr_scheduler,
            seed,
            router_aux_loss_coef=router_aux_loss_coef,
            router_aux_loss_over=router_aux_loss_over,
        )
        if self.learns_from_scores and not rewards:
            raise UserError("rewards is empty: name at least one reward function, such as a trained reward model")
        if self.learns_from_scores and generation.temperature == 0:
            raise UserError("generation.temperature=0 samples nothing to learn from: use a positive temperature")
        if rows_at_once is not None and rows_at_once < 1:
            raise UserError(f"rows_at_once={rows_at_once}: give at least 1, or leave it out for all rows at once")
        if not use_reference and reference is not None:
            raise UserError(f"reference={reference.path or reference.config!r} with use_reference=false: drop one")
        self.rewards = rewards
        if not use_reference and reference_sync is not None:
            raise UserError("reference_sync moves a reference, and use_reference is false: drop one")
        self.use_reference = use_reference
        self.reference_sync = reference_sync
        if old_logprobs == "sampler" and not generation.keep_logprobs:
            raise UserError(
                "old_logprobs='sampler' takes what the sampler said about its own tokens, and "
                "generation.keep_logprobs is false: set it to true"
            )
        if old_logprobs == "sampler" and generation.truncates and not renormalise_truncated:
            raise UserError(
                "old_logprobs='sampler' is over what the sampler kept, and renormalise_truncated is false: drop one"
            )
        self.renormalise_truncated = renormalise_truncated
        self.old_logprobs = old_logprobs
        self.make_engine = engine
        self._engine_is_behind = True
        """Whether the policy may have moved since the engine was last given its weights."""
        self.reference_spec = reference
        self.generation = generation
        self.updates = updates
        self.rows_at_once = rows_at_once
        self._ahead: Ahead | None = None
        """Answers for the next rollout, on their way while this one is trained on."""
        self._saved_ahead: Mapping[str, Any] | None = None
        own = [
            name for name in ("sample", "generate") if getattr(type(self), name) is not getattr(OnPolicyModule, name)
        ]
        if updates.async_rollouts and own:
            raise UserError(
                f"updates.async_rollouts=true samples in the background by the engine alone, and {type(self).__name__} "
                f"has a {own[0]}() of its own: leave async_rollouts out, or write an engine"
            )
        self.policy: Policy | None = None
        self._frozen: dict[str, Any] = {}
        """Models that are neither trained nor saved, kept out of Module's registry."""
        self._pending_metrics: dict[str, float] = {}
        """Metrics of the last rollout; logged by the next training step, where Lightning accepts them."""
        self._validation_sums: dict[str, float] = {}
        self._step_is_empty = False
        """Whether nothing counts in the current optimiser step, on any rank."""

    # ---- building --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.policy is None:
            engine = self.make_engine(self.generation, self.tokenizer)
            self.engine = engine.ahead() if self.updates.async_rollouts else engine
            if self.renormalise_truncated and not self.engine.says_kept:
                _refuse_truncation(self.engine, self.generation)
            self.policy = load_policy(self.model_spec)
            if self.use_reference:
                self._frozen["reference"] = self.build_reference(self.policy)
            self.router_balance.watch(self.policy, self._answers_of_rows)

    def build_reference(self, policy: Policy) -> Reference:
        """The frozen model that the policy is compared with."""
        return make_reference(policy, self.reference_spec, sync=self.reference_sync)

    @property
    def reference(self) -> Reference | None:
        return self._frozen.get("reference")

    def frozen_models(self) -> list[nn.Module]:
        return [] if self.reference is None else list(self.reference.own_models())

    def reward_models(self) -> list[nn.Module]:
        """Models that score answers, shared out over processes where the policy is.

        One that is asked under a time limit stays whole: a thread that is left behind at the limit goes on reading
        weights, which must not be taken away then.
        """
        return [reader.model for reader, timed in readers_of(self.rewards) if not timed]

    def on_fit_start(self) -> None:
        self._move_frozen()
        if is_sharded(self) and root_of(self) is None:  # FSDP1 shares out what is trained alone
            for reader in (reader for reader, timed in readers_of(self.rewards) if timed):
                logger.warning(
                    "reward model %r is whole on every process, because it is asked under a timeout_s: without one it "
                    "would be shared out",
                    reader.spec.path,
                )
        precision = self.trainer.precision_plugin
        plain = type(precision) in (Precision, MixedPrecision)
        if root_of(self) is not None:  # FSDP1 has a plugin of its own for every precision
            plain = precision.precision in ("32-true", "bf16-mixed")
        if self.updates.async_rollouts and not plain:
            raise UserError(
                f"updates.async_rollouts=true under trainer.precision={self.trainer.precision!r}, which changes the "
                "dtype of every thread's tensors: use 32-true or bf16-mixed, or leave async_rollouts out"
            )

    def on_validation_start(self) -> None:
        self._move_frozen()
        self._engine_is_behind = True  # a callback may have put other weights in for the evaluation

    def on_validation_end(self) -> None:
        self._engine_is_behind = True  # and taken them out again

    def on_test_start(self) -> None:
        self._move_frozen()
        self._engine_is_behind = True

    def on_predict_start(self) -> None:
        self._engine_is_behind = True

    def configure_callbacks(self) -> list[Callback]:
        return [WaitForAhead()] if self.updates.async_rollouts else []

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._saved_ahead is not None:
            # whether they are used or not, the prompts were drawn: they come again
            self._loader.draw_again()
            if self.updates.async_rollouts:
                answers = Generated(**self._saved_ahead).to(self.device)
                self._ahead = Ahead(None, lambda: answers)
        self._saved_ahead = None

    def on_train_end(self) -> None:
        super().on_train_end()
        if self._ahead is not None:  # a run that stops early; what its last answers ended with is not kept back
            self._ahead.answers()

    def wait_for_ahead(self) -> None:
        """Until nothing is sampled in the background any more."""
        if self._ahead is not None:
            self._ahead.wait()

    def teardown(self, stage: str) -> None:
        self.wait_for_ahead()
        if self.policy is not None:
            self.engine.close()
            self._engine_is_behind = True

    def _move_frozen(self) -> None:
        if self.reference is not None:
            self.reference.to(self.device)
        for weighted in self.rewards:
            move = getattr(weighted.reward, "to", None)
            if callable(move):
                move(self.device)

    def wrap_train_dataloader(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Prompts in, minibatches of rollouts out."""
        self._ahead = None
        self._loader = RolloutLoader(
            loader,
            self,
            self.updates,
            accumulate=self.trainer.accumulate_grad_batches,
            seed=self.seed,
            add_over_ranks=self.add_over_ranks,
            extra=self.extra_loader(),
            rank=self.data_rank,
            limit=lambda: self.trainer.num_training_batches,
            measure=self.measure_step,
            kind=self.rollout_kind,
        )
        return self._loader

    def extra_loader(self) -> Iterable[TokenBatch] | None:
        """Batches of a second source to be trained on alongside; None = no such source."""
        return None

    # ---- collecting ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, draw: Callable[[], PromptBatch]) -> AnyRollouts:
        """Answers to the prompts that `draw` gives, scored and made ready to be trained on."""
        failpoint("collect.before")
        tell(self, "on_rollout_start")
        phase = Phases(self)
        with self.measuring():
            answered = self.answer(draw, phase)
            if self._another_follows():
                self._sample_ahead(draw)
            else:
                self.engine.rest()
        rollouts, metrics = self.prepare(answered, phase)
        self._pending_metrics = metrics | self._staleness(answered) | phase.times()
        tell(self, "on_rollout_end", rollouts)
        failpoint("collect.after")
        return rollouts

    @abstractmethod
    def prepare(self, answered: Answered, phase: Phases) -> tuple[AnyRollouts, dict[str, float]]:
        """Scored answers as they are trained on, and metrics of the rollout."""

    def answer(self, draw: Callable[[], PromptBatch], phase: Phases) -> Answered:
        """One batch of prompts, answered and scored."""
        ahead = self._ahead
        prompts = None if ahead is None else ahead.prompts
        prompts = self.draw_prompts(draw).to(self.device) if prompts is None else prompts
        with phase("generate"), told("generation", self._smaller_generation(prompts)):
            answers = self.sample(prompts) if ahead is None else ahead.answers()
        self._ahead = None
        failpoint("score.before")
        with phase("score"):
            scored = self.score(prompts, answers)
        failpoint("score.after")
        tell(self, "on_rollout_scored", answers, scored)
        groups = torch.arange(prompts.tokens.shape[0], device=self.device)
        groups = groups.repeat_interleave(self.generation.num_samples)
        # a dropped answer is compared with nothing, and nothing with it
        rows = torch.arange(len(groups), device=self.device)
        groups = torch.where(scored.counts.to(self.device), groups, len(groups) + rows)
        staleness = torch.full(groups.shape, 0.0 if ahead is None else 1.0, device=self.device)
        return Answered(prompts, without_dropped(answers, scored), scored, groups, staleness)

    def draw_prompts(self, draw: Callable[[], PromptBatch]) -> PromptBatch:
        """The next batch of prompts, as they are asked."""
        return draw()

    def _smaller_generation(self, prompts: PromptBatch) -> str:
        if not self.engine.heeds_rows_at_once:
            return f"data.batch_size={max(len(prompts.tokens) // 2, 1)}"
        rows = self.generation.rows_at_once or len(prompts.tokens) * self.generation.num_samples
        return f"generation.rows_at_once={max(rows // 2, 1)}"

    def smaller_batches(self, purpose: str, batch: Batch, pieces: int) -> str:
        if purpose == "measuring" and isinstance(batch, Generated):
            return f"rows_at_once={max(batch.num_units // pieces, 1)}"
        return f"trainer.accumulate_grad_batches={pieces * self.trainer.accumulate_grad_batches}"

    def sample(self, prompts: PromptBatch) -> Generated:
        """Answers to train on, those to one prompt side by side."""
        return self.generate(prompts, self._rollout_seed("rollout", self._loader.drawn - 1))

    def generate(self, prompts: PromptBatch, seed: int, spec: GenerationSpec | None = None) -> Generated:
        """Answers of the policy as it is now to prompts; the same seed and weights give the same answers.

        Args:
            spec: how to sample; None: as `generation` says.
        """
        self.wait_for_ahead()
        self._hand_over()
        engine = self.engine if spec is None else self.engine.with_spec(spec)
        return self._answers_of_engine(engine, prompts, seed)

    def _hand_over(self) -> None:
        """The policy's weights to the engine, if it may lack them."""
        if not self._engine_is_behind:
            return
        if self.updates.async_rollouts:
            # one server may be asked by several ranks: all of them must have their answers by the old weights
            self.add_over_ranks(torch.zeros(1))
        self.engine.take_weights(self.policy)
        self._engine_is_behind = False

    def _answers_of_engine(self, engine: RolloutEngine, prompts: PromptBatch, seed: int) -> Generated:
        answers = engine.generate(self.policy, prompts, seed=seed)
        return answers if self.renormalise_truncated else replace(answers, kept=None)

    # ---- sampling while the policy is trained ----------------------------------------------------------------------

    def _another_follows(self) -> bool:
        """Whether answers are sampled ahead, and there is a rollout for them behind the one that is being collected."""
        if not self.updates.async_rollouts:
            return False
        trainer = self.trainer
        if trainer.max_steps >= 0 and trainer.global_step + self._loader.steps_of_rollout >= trainer.max_steps:
            return False
        endless = trainer.max_epochs is None or trainer.max_epochs < 0
        return self._loader.another_in_epoch or endless or trainer.current_epoch + 1 < trainer.max_epochs

    def _sample_ahead(self, draw: Callable[[], PromptBatch]) -> None:
        """Let the policy as it is now answer the first prompts of the next rollout, while it is trained on this one."""
        prompts = self.draw_prompts(draw).to(self.device)
        seed = self._rollout_seed("rollout", self._loader.drawn - 1)
        self._hand_over()
        precision, device = self.trainer.precision_plugin, self.device

        def sample() -> Generated:
            # threads have an autocast and a current device of their own
            autocast = precision.autocast_context_manager() if isinstance(precision, MixedPrecision) else nullcontext()
            on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with on_device, autocast:
                return self._answers_of_engine(self.engine, prompts, seed)

        self._ahead = Ahead(prompts, sample)

    def _staleness(self, answered: Answered) -> dict[str, float]:
        """How old the answers are, over those of all ranks that count."""
        if not self.updates.async_rollouts:
            return {}
        counts = answered.answers.mask.any(-1)
        here = torch.stack((torch.where(counts, answered.staleness, 0.0).sum(), counts.sum()))
        total, answers = self.add_over_ranks(here.double().cpu()).tolist()
        return {"rollout/staleness": total / max(answers, 1)}

    def samples(self, prompts: PromptBatch, answers: Generated) -> list[Sample]:
        """Answers as text, the way reward functions see them."""
        return decode_samples(self.tokenizer, prompts, answers)

    def score(self, prompts: PromptBatch, answers: Generated) -> ScoredSamples:
        """Scores of answers by the reward functions, weighted and added, with their breakdown."""
        return self.score_samples(self.samples(prompts, answers))

    def score_samples(self, samples: Sequence[Sample]) -> ScoredSamples:
        """What the reward functions say of samples; all ranks call it together, each with its own."""
        if not self.rewards:
            return unscored(samples)
        with ExitStack() as stack:
            for model in self.reward_models():  # functions ask as often as they like, in threads of their own perhaps
                stack.enter_context(gathered_once(model, before_use=True))
            if self.tensor_parallel is None:
                return score_samples(self.rewards, samples)
            # of one process: those of a group must learn from the same scores, and a judge or a time limit may differ
            return self.tensor_parallel.of_first(lambda: score_samples(self.rewards, samples))

    def _measure_policy(self, answers: Generated) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log-probabilities, entropy, and what there is to say about the sampler, by the names of the metrics."""
        assert self.policy is not None
        if self.old_logprobs == "sampler":
            assert answers.sampler_logprobs is not None
            entropy = answers.sampler_entropy
            # -log p of the drawn token has the entropy for its mean
            return answers.sampler_logprobs, -answers.sampler_logprobs if entropy is None else entropy, {}
        with gathered_once(self.policy):  # ranks may have different numbers of parts
            parts = self.measured(answers, lambda part: self._token_scores(part, with_entropy=True))
        logprobs = torch.cat([part.logprobs for part in parts]).float()
        sampler = {}
        if answers.kept is not None:
            sampler["rollout/kept_mass"] = torch.cat([part.kept_mass for part in parts])
        if answers.sampler_logprobs is not None:
            sampler["rollout/logprob_gap"] = (logprobs - answers.sampler_logprobs).abs()
        return logprobs, torch.cat([part.entropy for part in parts]).float(), sampler

    def _measure_reference(self, answers: Generated) -> Tensor:
        """Log-probabilities under the reference; 0 without one."""
        reference = self.reference
        if reference is None:
            return torch.zeros(answers.tokens.shape, device=self.device)
        temperature = self.generation.temperature
        with gathered_once(reference.policy):
            parts = self.measured(
                answers,
                lambda part: reference(part, temperature=temperature, answers=self.shared(part)).logprobs,
            )
        return torch.cat(parts).float()

    def _token_scores(self, batch: Any, *, with_entropy: bool) -> TokenScores:
        """Log-probabilities at the temperature that the answers were sampled at."""
        assert self.policy is not None
        return self.policy(
            batch,
            temperature=self.generation.temperature,
            with_entropy=with_entropy,
            answers=self.shared(batch),
        )

    def shared(self, batch: Generated | Rollouts | AnswerRollouts) -> Tensor | None:
        """Which tokens are answers, where several share a prompt that then need be computed only once."""
        return batch.mask if self.generation.num_samples > 1 else None

    def _answers_of_rows(self, rows: TokenBatch | Rollouts | AnswerRollouts) -> Tensor | None:
        return None if isinstance(rows, TokenBatch) else self.shared(rows)

    def measured(self, answers: Generated, run: Callable[[Generated], Measured]) -> list[Measured]:
        """What `run` says of the answers, so many rows after so many."""
        return [result for part in self._parts(answers) for result in self.splitter.results(part, run)]

    def _parts(self, answers: Generated) -> Iterator[Generated]:
        rows = torch.arange(answers.tokens.shape[0], device=answers.tokens.device)
        for some in rows.split(self.rows_at_once or len(rows)):
            yield answers.select(some)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Models speak as in evaluation, in the precision that they are trained in."""
        was_training = self.training
        self.eval()
        try:
            with self.trainer.precision_plugin.forward_context():
                yield
        finally:
            self.train(was_training)

    def _rollout_seed(self, purpose: str, index: int) -> int:
        return counter_seed(self.seed, purpose, index, self.data_rank)

    # ---- metrics ---------------------------------------------------------------------------------------------------

    def log_pending(self) -> None:
        """Log the metrics of the last rollout; called from the training step, where Lightning accepts them."""
        if self._pending_metrics:
            shown = ("rollout/score", "rollout/kl")
            self.log_dict({k: v for k, v in self._pending_metrics.items() if k in shown}, prog_bar=True, batch_size=1)
            self.log_dict({k: v for k, v in self._pending_metrics.items() if k not in shown}, batch_size=1)
            self._pending_metrics = {}

    # ---- steps that are not taken ----------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: AnyRollouts, batch_idx: int) -> None:
        # here, because Lightning's optimiser step is entered before the training step inside it
        self._step_is_empty = batch.totals is not None and batch.totals[self.denominator] == 0

    def skips_step(self) -> bool:
        """Whether the optimiser step that is being entered is not to be taken."""
        return self._step_is_empty

    def zero_loss(self) -> Tensor:
        """Nothing to learn, but every parameter takes part, for DDP's sake."""
        if is_sharded(self):  # which waits for no gradient
            return torch.zeros((), device=self.device, requires_grad=True)
        return sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0  # type: ignore[return-value]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Skips a step in which nothing counts: an optimiser with momentum would move on a gradient of 0."""
        if self.skips_step():
            closure = kwargs.get("optimizer_closure") or args[3]
            closure()
        else:
            super().optimizer_step(*args, **kwargs)
            self._engine_is_behind = True
        # a step that was skipped counts like any other: else a reference whose turn falls on such steps never moves
        if self.reference_sync is not None and self.reference is not None:
            # what was collected keeps what the reference said then; the next rollout hears the new one
            assert self.policy is not None
            self.reference_sync.after_step(self.trainer.global_step + 1, self.reference, self.policy)

    # ---- state -----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["pending_metrics"] = dict(self._pending_metrics)
        if self.updates.async_rollouts:
            ahead = None if self._ahead is None else buffer_to_dict(self._ahead.answers())
            checkpoint["ahead"] = self._of_all_ranks(ahead)
        if self.reference_sync is not None and self.reference is not None:
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._engine_is_behind = True
        self._pending_metrics = dict(checkpoint.get("pending_metrics", {}))
        if self._saved_progress is not None and "ahead" in checkpoint:
            self._saved_ahead = checkpoint["ahead"][self.trainer.global_rank]
        if "reference" in checkpoint and self.reference_sync is not None and self.reference is not None:
            self.reference.load_state_dict(checkpoint["reference"])

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer held-out prompts, with the same seeds at every evaluation."""
        answers = self.generate(batch, self._rollout_seed("evaluation", batch_idx))
        scored = self.score(batch, answers)
        answers = without_dropped(answers, scored)
        valid = scored.counts.to(answers.mask.device)
        sums = {
            "score": scored.total.sum(),
            "length": answers.mask.sum(),
            "finished_frac": (answers.finished & valid).sum(),
            **{f"reward_{name}": values.sum() for name, values in (scored.breakdown | scored.parts).items()},
            "count": valid.sum(),
        }
        if self.reference is not None:
            old, *_ = self._measure_policy(answers)
            sums["kl"] = (old - self._measure_reference(answers)).sum()
        for name, value in sums.items():
            self._validation_sums[name] = self._validation_sums.get(name, 0.0) + float(value)

    def evaluation_metrics(self) -> dict[str, float]:
        names = sorted(self._validation_sums)
        vector = torch.tensor([self._validation_sums[name] for name in names], dtype=torch.float64)
        sums = dict(zip(names, self.add_over_ranks(vector).tolist(), strict=True))
        self._validation_sums = {}
        count = sums.pop("count", 0.0)
        return {name: total / count for name, total in sums.items()} if count else {}

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        """Answers as text."""
        self._move_frozen()
        answers = self.generate(batch, self._rollout_seed("predict", batch_idx))
        return [sample.completion for sample in self.samples(batch, answers)]


class WaitForAhead(Callback):
    """An error or a signal that ends a run leaves no thread behind; Lightning tells callbacks of it, and no module."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, OnPolicyModule):
            pl_module.wait_for_ahead()


def _refuse_truncation(engine: RolloutEngine, generation: GenerationSpec) -> None:
    options = truncating_options(generation)
    if options:
        raise UserError(
            f"{', '.join(options)}: {type(engine).__name__} does not say which tokens it kept, so ratios could not be "
            "taken over them: leave it out, sample with HFGenerate, or (GRPOModule) set renormalise_truncated: false"
        )
