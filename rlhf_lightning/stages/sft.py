"""Supervised fine-tuning, continued pretraining, and distillation from a teacher on the same records."""

from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.logprobs import TokenScores
from rlhf_lightning.core.masked import masked_mean, reduce_tokens
from rlhf_lightning.losses.distillation import TeacherLoss
from rlhf_lightning.losses.supervised import NLL, TokenLoss, token_nll
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.models.teacher import inert_teacher_options, load_teacher, named_teacher
from rlhf_lightning.stages.base import RLHFModule
from rlhf_lightning.stages.lesson import Lesson, teach
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule
from rlhf_lightning.stages.step_means import StepMeans


class SFTModule(RLHFModule):
    """Maximises the likelihood of the trained tokens.

        loss = sum over trained tokens of loss_t / number of trained tokens,    NLL: loss_t = -log pi(t | tokens before)

    The number is that of the whole optimiser step, over micro-batches and ranks: the loss is the token mean, however
    the step was cut. `text` records train every token (continued pretraining); prompt-completion and chat records
    train the answers. With `Distillation` for the loss, the model learns from what a teacher expects at each token:
    docs/distillation.md.

    Logs `train/loss`, `train/token_accuracy`; `val/loss`, `val/perplexity`, `val/token_accuracy`; with a teacher
    `train/divergence`, `val/divergence` and its own likelihood, `val/teacher_loss`.

    Args:
        policy: the model to train.
        loss: of a token; validation is by the likelihood, whatever it is.
        teacher: of `Distillation`: the model to learn from, frozen; its tokenizer is the policy's.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (TRL's); 0: none.
        router_aux_loss_over: it is taken over the whole optimiser step (as transformers takes it over a batch), or in
            each sequence (DeepSeek-V3).
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of the stage's own draws; None: the run's.
    """

    batch_format = "tokens"

    def __init__(
        self,
        policy: ModelSpec,
        loss: TokenLoss = NLL(),
        teacher: ModelSpec | None = None,
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        schedule: Schedule = Schedule(),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
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
        self.save_hyperparameters()
        self.loss = loss
        self.teacher_spec = named_teacher(teacher, type(loss).__name__) if isinstance(loss, TeacherLoss) else None
        self._unread_teacher = None if isinstance(loss, TeacherLoss) else teacher
        self.policy: Policy | None = None
        self._frozen: dict[str, Reference] = {}
        """The teacher, kept out of Module's registry: neither trained nor saved."""
        self._evaluation = StepMeans()
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = load_policy(self.model_spec)
            if self.teacher_spec is not None:
                self._frozen["teacher"] = load_teacher(self.teacher_spec, self.policy, self.tokenizer)
            self.router_balance.watch(self.policy)

    @property
    def teacher(self) -> Reference | None:
        """The model to learn from; None: the loss reads none."""
        return self._frozen.get("teacher")

    def readers(self) -> list[ModelSpec]:
        return [*super().readers(), *([] if self.teacher_spec is None else [self.teacher_spec])]

    def frozen_models(self) -> list[nn.Module]:
        return [] if self.teacher is None else list(self.teacher.own_models())

    def inert_options(self) -> Iterable[tuple[str, str]]:
        yield from super().inert_options()
        if self._unread_teacher is not None:
            yield "teacher", f"the loss {type(self.loss).__name__} reads no teacher (Distillation does)"
        if self.teacher_spec is not None:
            yield from ((f"teacher.{name}", why) for name, why in inert_teacher_options(self.teacher_spec))

    def on_fit_start(self) -> None:
        self._move_teacher()

    def on_validation_start(self) -> None:
        self._move_teacher()

    def on_test_start(self) -> None:
        self._move_teacher()

    def _move_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def forward(self, batch: TokenBatch) -> TokenScores:
        """Log-probability and arg-max match of every token that counts."""
        assert self.policy is not None
        return self.policy(batch)

    def lesson(self, batch: TokenBatch, loss: TeacherLoss, **more: bool) -> Lesson:
        """The batch as the model and its teacher see it; `more` as of `teach`."""
        assert self.policy is not None
        assert self.teacher is not None
        return teach(self.policy, self.teacher, batch, loss, **more)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        with self.router_balance.heard() as hearing:
            if isinstance(self.loss, TeacherLoss):
                lesson = self.lesson(batch, self.loss, with_scores=self.loss.reads_logprobs)
                per_token, metrics = lesson.loss(self.loss), lesson.metrics()
            else:
                scores = self(batch)
                per_token, metrics = self.loss(scores.logprobs), {"token_accuracy": scores.is_argmax.float()}
        loss = reduce_tokens(per_token, batch.mask, "token_mean", batch.total("tokens"))
        named = {"train/loss": per_token} | {f"train/{name}": values for name, values in metrics.items()}
        self.step_means.add(named, scored_tokens(batch.mask))
        self.log_step_means(batch_idx, prog_bar=True)
        loss = loss + self.router_loss(hearing, batch, batch_idx)
        return loss * self.loss_scale

    def evaluate(self, batch: TokenBatch, batch_idx: int) -> None:
        mask = scored_tokens(batch.mask)
        if isinstance(self.loss, TeacherLoss):
            lesson = self.lesson(batch, self.loss, with_scores=True, with_teacher=True)
            assert lesson.scores is not None
            assert lesson.teacher_logprobs is not None
            scores = lesson.scores
            theirs = {"divergence": lesson.divergence, "teacher_loss": token_nll(lesson.teacher_logprobs)}
            self._evaluation.add(theirs, mask)
        else:
            scores = self(batch)
        tokens = mask.sum()
        self.val_loss.update(masked_mean(token_nll(scores.logprobs), mask), tokens)
        self.val_accuracy.update(masked_mean(scores.is_argmax.float(), mask), tokens)

    def evaluation_metrics(self) -> dict[str, Tensor]:
        loss, accuracy = self.val_loss.compute(), self.val_accuracy.compute()
        self.val_loss.reset()
        self.val_accuracy.reset()
        beside = self._evaluation.take(self.add_over_ranks)
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": accuracy, **beside}

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Log-probability of each row's trained tokens, summed (nats)."""
        return self(batch).logprobs.sum(-1)

    def export(self, folder: str | Path) -> Path:
        assert self.policy is not None, "nothing to export before the model is built"
        return export_policy(self.policy, self.tokenizer, folder, card=self.card("Supervised fine-tuned model"))


def scored_tokens(mask: Tensor) -> Tensor:
    """The tokens that are both meant to be trained and have a predictor: never the first of a row."""
    scored = mask.clone()
    scored[:, 0] = False
    return scored
