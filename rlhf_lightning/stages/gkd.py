"""Distillation on the student's own answers: at each token it wrote, what would the teacher have expected?"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_lightning.core.batches import AnswerRollouts, Generated, PromptBatch, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.losses.distillation import Distillation, TeacherLoss
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.sharded import gathered_once
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.models.teacher import inert_teacher_options, load_teacher, named_teacher
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rollout.answers import check_context
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import EngineFactory, GenerationSpec
from rlhf_lightning.stages.answered import Answered, without_dropped
from rlhf_lightning.stages.lesson import Lesson, teach
from rlhf_lightning.stages.on_policy import OnPolicyModule
from rlhf_lightning.stages.phases import Phases
from rlhf_lightning.stages.rollout_metrics import answer_metrics
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule
from rlhf_lightning.stages.step_means import StepMeans

_OWN, _OF_RECORDS = "loss on own answers", "loss on records"


class GKDModule(OnPolicyModule):
    """Generalised knowledge distillation: the student answers, and learns at each token what the teacher expected.

        loss = on_policy_frac mean_t D(p_t, q_t) over answers of the student
               + (1 - on_policy_frac) mean_t D(p_t, q_t) over records                     D by `loss`

    Means are over the tokens of the whole optimiser step, over micro-batches and ranks. No gradient goes through the
    sampling. With reverse_kl and on_policy_frac 1 it is on-policy distillation with the KL of each token taken over the
    whole vocabulary; records alone are SFTModule's.

    Args:
        policy: the student.
        teacher: the model to learn from, frozen; its tokenizer is the student's.
        loss: how far apart both are at a token; a likelihood in it is of the records alone.
        on_policy_frac: weight of the student's own answers, above 0, to 1; the rest is that of data.pretraining.
        rewards: functions whose scores of the answers are logged, and never trained on; None: there are none.
        generation: how the student samples.
        updates: inner epochs and minibatches of each batch of answers.
        engine: what samples.
        rows_at_once: sequences measured in one forward pass in validation; None: all.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (TRL's); 0: none.
        router_aux_loss_over: it is taken over the whole optimiser step (as transformers takes it over a batch), or in
            each sequence (DeepSeek-V3).
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of sampling and minibatch order; None: the run's.

    References:
        Agarwal et al., On-Policy Distillation of Language Models (GKD), 2023. arXiv:2306.13649
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023. arXiv:2306.08543
    """

    rollout_kind = AnswerRollouts
    learns_from_scores = False

    def __init__(
        self,
        policy: ModelSpec,
        teacher: ModelSpec,
        loss: TeacherLoss = Distillation("reverse_kl"),
        on_policy_frac: float = 1.0,
        rewards: list[WeightedReward] | None = None,
        generation: GenerationSpec = GenerationSpec(),
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
        super().__init__(
            policy,
            rewards or [],
            None,
            generation,
            updates,
            rows_at_once,
            optimizer,
            schedule,
            lr_scheduler,
            seed,
            engine=engine,
            renormalise_truncated=False,  # no ratio is taken
            router_aux_loss_coef=router_aux_loss_coef,
            router_aux_loss_over=router_aux_loss_over,
        )
        if not 0 < on_policy_frac <= 1:
            raise UserError(
                f"on_policy_frac={on_policy_frac} is the weight of the student's own answers: give above 0, to 1; to "
                "learn from records alone use SFTModule with loss: Distillation and a teacher"
            )
        if loss.reads_logprobs and on_policy_frac == 1:
            raise UserError(
                "on_policy_frac=1 leaves no records, whose likelihood the loss adds (nll_coef), and that of its own "
                "answers would only make the student surer of itself: set nll_coef: 0, or on_policy_frac below 1"
            )
        self.save_hyperparameters()
        self.teacher_spec = named_teacher(teacher, type(self).__name__)
        self.loss = loss
        self.on_policy_frac = on_policy_frac
        self._evaluation = StepMeans()

    def inert_options(self) -> Iterable[tuple[str, str]]:
        yield from super().inert_options()
        yield from ((f"teacher.{name}", why) for name, why in inert_teacher_options(self.teacher_spec))
        if self.generation.keep_logprobs:
            yield "generation.keep_logprobs", "no ratio to the sampler is taken"

    # ---- building --------------------------------------------------------------------------------------------------

    def readers(self) -> list[ModelSpec]:
        return [*super().readers(), self.teacher_spec]

    def build_reference(self, policy: Policy) -> Reference:
        return load_teacher(self.teacher_spec, policy, self.tokenizer, reads_answers=True)

    @property
    def teacher(self) -> Reference:
        """The model to learn from."""
        assert self.reference is not None, "there is none before the models are built"
        return self.reference

    @property
    def reads_pretraining(self) -> bool:
        return self.on_policy_frac < 1

    def extra_loader(self) -> Iterable[TokenBatch] | None:
        if not self.reads_pretraining:
            return None
        loader: Iterable[TokenBatch] = self.trainer.datamodule.pretraining_dataloader()  # type: ignore[attr-defined]
        return loader

    # ---- training --------------------------------------------------------------------------------------------------

    def draw_prompts(self, draw: Callable[[], PromptBatch]) -> PromptBatch:
        prompts = super().draw_prompts(draw)
        check_context(self.generation, self.teacher.policy, prompts, whose="the teacher")
        return prompts

    def prepare(self, answered: Answered, phase: Phases) -> tuple[AnswerRollouts, dict[str, float]]:
        """The answers as they are."""
        answers = answered.answers
        rollouts = AnswerRollouts(answers.tokens, answers.attention_mask, answers.mask, answers.positions)
        return rollouts, answer_metrics(answers, answered.scored, self.add_over_ranks)

    def lesson(self, batch: AnswerRollouts | Generated) -> Lesson:
        """Answers as the student and its teacher see them."""
        assert self.policy is not None
        return teach(self.policy, self.teacher, batch, self.loss, answers=self.shared(batch))

    def training_step(self, batch: AnswerRollouts, batch_idx: int) -> Tensor:
        self.log_pending()
        if self._step_is_empty:
            return self.zero_loss()
        with self.router_balance.heard() as hearing:
            per_token = self._noted(self.lesson(batch), batch.mask, _OWN, "train/")
            loss = self.on_policy_frac * reduce_tokens(per_token, batch.mask, "token_mean", batch.total("tokens"))
            if batch.extra is not None:
                loss = loss + (1 - self.on_policy_frac) * self._on_records(batch.extra, batch.total("extra_tokens"))
        if self.ends_step(batch_idx):
            metrics = self.step_means.take(self.add_over_ranks)
            total = self.on_policy_frac * metrics.pop(_OWN)
            total = total + (1 - self.on_policy_frac) * metrics.pop(_OF_RECORDS, 0.0)
            self.log_dict({"train/loss": total, **metrics}, prog_bar=True, batch_size=1)
        return (loss + self.router_loss(hearing, batch, batch_idx)) * self.loss_scale

    def _on_records(self, records: TokenBatch, denominator: float) -> Tensor:
        """The mean over the step of the loss on records: this micro-batch's share."""
        assert self.policy is not None
        mask = records.mask.clone()
        mask[:, 0] = False  # nothing predicts the first token
        lesson = teach(self.policy, self.teacher, records, self.loss, with_scores=self.loss.reads_logprobs)
        per_token = self._noted(lesson, mask, _OF_RECORDS, "train/records_")
        return reduce_tokens(per_token, mask, "token_mean", denominator)

    def _noted(self, lesson: Lesson, mask: Tensor, name: str, prefix: str) -> Tensor:
        """The loss per token; it and what is behind it are counted."""
        per_token = lesson.loss(self.loss)
        behind = {f"{prefix}{key}": values for key, values in lesson.metrics().items()}
        self.step_means.add({name: per_token, **behind}, mask)
        return per_token

    # ---- evaluation and export -------------------------------------------------------------------------------------

    def evaluate(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer held-out prompts, with the same seeds at every evaluation, and ask the teacher about it."""
        check_context(self.generation, self.teacher.policy, batch, whose="the teacher")
        answers = self.generate(batch, self._rollout_seed("evaluation", batch_idx))
        scored = self.score(batch, answers)
        answers = without_dropped(answers, scored)
        with gathered_once(self.policy), gathered_once(self.teacher.policy):  # ranks may have other numbers of parts
            parts = self.measured(answers, lambda part: self.lesson(part).divergence)
        self._evaluation.add({"divergence": torch.cat(parts)}, answers.mask)
        of_functions = {"score": scored.total} if scored.breakdown else {}
        of_functions |= {f"reward_{name}": values for name, values in (scored.breakdown | scored.parts).items()}
        per_sequence = {"length": answers.mask.sum(-1), "finished_frac": answers.finished, **of_functions}
        here = {name: values.to(self.device) for name, values in per_sequence.items()}
        self._evaluation.add(here, scored.counts.to(self.device))

    def evaluation_metrics(self) -> dict[str, Tensor]:
        return self._evaluation.take(self.add_over_ranks)

    def export(self, folder: str | Path) -> Path:
        """The student to `folder`."""
        assert self.policy is not None, "nothing to export before the model is built"
        return export_policy(self.policy, self.tokenizer, folder, card=self.card("Student of a larger model"))
