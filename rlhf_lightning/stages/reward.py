"""Reward modelling: one number per answer, learnt from pairs, rankings or ratings; or per step of it, from labels."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryCalibrationError

from rlhf_lightning.core.batches import (
    Batch,
    PairBatch,
    RankedBatch,
    RatedBatch,
    StepBatch,
    TokenBatch,
    concatenate_rows,
)
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardLoss, RewardLossOutput
from rlhf_lightning.losses.reward_model import BradleyTerry
from rlhf_lightning.models.export import export_scalar_model
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.scalar_head import Pooling, ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages.base import RLHFModule
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule

CALIBRATED = ("pairs", "steps")
"""Records whose scores make a probability."""


class RewardModule(RLHFModule):
    """Learns a score whose differences explain which answers were preferred.

        bradley_terry  -log sigma(score(chosen) - score(rejected) - margin)
        plackett_luce  the same, averaged over all pairs of a ranked prompt
        regression     (score - rating)^2
        steps          -y log sigma(score) - (1 - y) log sigma(-score), a score per step of the answer

    The loss is the mean over the pairs (prompts, ratings, steps) of the whole optimiser step, over micro-batches and
    ranks.
    The score is read at the last real token (or averaged over the answer), whatever the padding token is.

    Logs `train/loss`, `train/accuracy`, `train/margin`, `train/score_mean`; `val/loss`, `val/accuracy`, `val/margin`,
    `val/ece` (calibration of sigma(margin), pairs and steps only), `val/score_mean`, `val/score_std`.

    Args:
        model: the model that gets a scalar head; a language model or an earlier reward model.
        loss: BradleyTerry for pairs, PlackettLuce for rankings, Regression for ratings, StepCorrectness for steps;
            decides what records are read.
        pooling: where the score is read: `last` real token, `mean` over the answer's tokens, or at the end of each of
            its `steps`.
        normalise_on: set whose scores get mean 0 and standard deviation 1 at the end of every epoch; the shift and
            scale are stored with the model. `none` leaves scores as trained (Ziegler et al. normalise; so do
            Stiennon et al.).
        normalise_batches: how many batches of that set to use.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (TRL's); 0: none.
        router_aux_loss_over: it is taken over the whole optimiser step (as transformers takes it over a batch), or in
            each sequence (DeepSeek-V3).
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of the head's initial weights; None: the run's.

    References:
        Ouyang et al., Training language models to follow instructions with human feedback, 2022. arXiv:2203.02155
    """

    def __init__(
        self,
        model: ModelSpec,
        loss: RewardLoss = BradleyTerry(),
        pooling: Pooling = "last",
        normalise_on: Literal["none", "train", "val"] = "none",
        normalise_batches: int = 64,
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        schedule: Schedule = Schedule(),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            schedule,
            lr_scheduler,
            seed,
            router_aux_loss_coef=router_aux_loss_coef,
            router_aux_loss_over=router_aux_loss_over,
        )
        self.save_hyperparameters()
        _check_steps(loss, pooling, normalise_on)
        self.loss = loss
        self.pooling = pooling
        self.normalise_on = normalise_on
        self.normalise_batches = normalise_batches
        self.model: ScalarModel | None = None
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()
        self.val_margin = MeanMetric()
        self.val_score = MeanMetric()
        self.val_score_square = MeanMetric()
        self.val_ece = BinaryCalibrationError(n_bins=10)

    @property
    def batch_format(self) -> Any:  # type: ignore[override]
        """What the loss compares."""
        return self.loss.batch_format

    def inert_options(self) -> Any:
        yield from super().inert_options()
        if self.normalise_on == "none" and self.normalise_batches != 64:
            yield "normalise_batches", "normalise_on is none"

    def configure_model(self) -> None:
        if self.model is None:
            self.model = load_scalar_model(self.model_spec, pooling=self.pooling, seed=self.seed)
            self.router_balance.watch(self.model)

    def forward(self, completions: TokenBatch) -> Tensor:
        """One score per completion; of steps, at every token."""
        assert self.model is not None
        return self.model(completions)

    def scores(self, batch: Batch) -> Tensor:
        """Scores of every completion of a batch: of pairs all chosen, then all rejected."""
        if isinstance(batch, PairBatch):
            return self(concatenate_rows((batch.chosen, batch.rejected), pad_id=self.tokenizer.pad_token_id))
        assert isinstance(batch, RankedBatch | RatedBatch | StepBatch)
        return self(batch.completions)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with self.router_balance.heard() as hearing:
            scores = self.scores(batch)
        output = self.loss(scores, batch)
        loss = output.per_element.sum() / batch.total(self.loss.denominator)
        elements = {"train/loss": output.per_element, "train/accuracy": output.accuracy, "train/margin": output.margin}
        self.step_means.add(elements, _scored(batch, output.per_element))
        self.step_means.add({"train/score_mean": scores}, _scored(batch, scores))
        self.log_step_means(batch_idx, prog_bar=True)
        loss = loss + self.router_loss(hearing, batch, batch_idx)
        return loss * self.loss_scale

    def evaluate(self, batch: Batch, batch_idx: int) -> None:
        scores = self.scores(batch)
        output: RewardLossOutput = self.loss(scores, batch)
        counts = _scored(batch, output.per_element)
        margin = output.margin[counts]
        scores = scores[_scored(batch, scores)]
        self.val_loss.update(output.per_element[counts])
        self.val_accuracy.update(output.accuracy[counts])
        self.val_margin.update(margin)
        self.val_score.update(scores)
        self.val_score_square.update(scores.square())
        if self.batch_format in CALIBRATED:
            # the prediction "the higher score wins" ("the step is right, or wrong") and whether it was so
            confidence = torch.sigmoid(margin.abs())
            self.val_ece.update(confidence, (margin > 0).long())

    def evaluation_metrics(self) -> dict[str, Tensor]:
        mean = self.val_score.compute()
        values = {
            "loss": self.val_loss.compute(),
            "accuracy": self.val_accuracy.compute(),
            "margin": self.val_margin.compute(),
            "score_mean": mean,
            "score_std": (self.val_score_square.compute() - mean.square()).clamp(min=0).sqrt(),
        }
        if self.batch_format in CALIBRATED:
            values["ece"] = self.val_ece.compute()
        for metric in (
            self.val_loss,
            self.val_accuracy,
            self.val_margin,
            self.val_score,
            self.val_score_square,
            self.val_ece,
        ):
            metric.reset()
        return values

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Scores of the batch's completions, or of its steps, one after another."""
        scores = self.scores(batch)
        return scores[_scored(batch, scores)]

    def on_train_start(self) -> None:
        super().on_train_start()
        self._train_unscaled()  # a run that goes on inside an epoch does not see its beginning

    def on_train_epoch_start(self) -> None:
        self._train_unscaled()

    def _train_unscaled(self) -> None:
        """The loss compares scores as they are trained, not as the last end of an epoch scaled them."""
        if self.normalise_on != "none":
            assert self.model is not None
            self.model.set_normalisation(0.0, 1.0)

    def on_train_epoch_end(self) -> None:
        if self.normalise_on != "none":
            self._normalise()

    @torch.no_grad()
    def _normalise(self) -> None:
        """Shift and scale so that the stated set has mean 0 and standard deviation 1."""
        assert self.model is not None
        loader = self.trainer.train_dataloader if self.normalise_on == "train" else self.trainer.val_dataloaders
        if not loader:
            raise UserError("normalise_on: val, but there is no validation data: give data.val or data.val_frac")
        if self.normalise_on == "train":
            loader = loader.loader
        self.model.set_normalisation(0.0, 1.0)
        self.model.eval()
        moments = torch.zeros(3, dtype=torch.float64)
        for index, batch in enumerate(loader):
            if index == self.normalise_batches:
                break
            scores = self.scores(batch.to(self.device)).double().cpu()
            moments += torch.stack((torch.tensor(float(scores.numel())), scores.sum(), scores.square().sum()))
        self.model.train()
        count, total, squares = self.add_over_ranks(moments).tolist()
        mean = total / count
        std = max(squares / count - mean**2, 0.0) ** 0.5
        if std == 0:
            raise UserError(f"all scores of the {self.normalise_on} set are equal ({mean}): nothing to normalise")
        self.model.set_normalisation(mean, std)

    def export(self, folder: str | Path) -> Path:
        assert self.model is not None, "nothing to export before the model is built"
        return export_scalar_model(self.model, self.tokenizer, folder, card=self.card("Reward model"))


def _scored(batch: Batch, x: Tensor) -> Tensor:
    """True on the elements of `x` that count: all, or of steps the tokens at which they are judged."""
    return batch.completions.mask if isinstance(batch, StepBatch) else torch.ones_like(x, dtype=torch.bool)


def _check_steps(loss: RewardLoss, pooling: Pooling, normalise_on: str) -> None:
    of_steps = loss.batch_format == "steps"
    if of_steps != (pooling == "steps"):
        remedy = "set pooling: steps" if of_steps else "use last or mean, or the loss StepCorrectness"
        reads = "judges each step" if of_steps else "compares whole answers"
        raise UserError(f"pooling={pooling!r}: {type(loss).__name__} {reads}: {remedy}")
    if of_steps and normalise_on != "none":
        raise UserError(
            f"normalise_on={normalise_on!r}: scores of {type(loss).__name__} are log-odds, which a shift would change: "
            "leave it out"
        )
