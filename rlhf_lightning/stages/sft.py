"""Supervised fine-tuning and continued pretraining: next-token likelihood of the tokens that count."""

from pathlib import Path

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.logprobs import TokenScores
from rlhf_lightning.core.masked import masked_mean, reduce_tokens
from rlhf_lightning.losses.supervised import NLL, SupervisedLoss, token_nll
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages.base import RLHFModule
from rlhf_lightning.stages.schedule import Schedule


class SFTModule(RLHFModule):
    """Maximises the likelihood of the trained tokens.

        loss = sum over trained tokens of loss_t / number of trained tokens,    NLL: loss_t = -log pi(t | tokens before)

    The number is that of the whole optimiser step, over micro-batches and ranks: the loss is the token mean, however
    the step was cut. `text` records train every token (continued pretraining); prompt-completion and chat records
    train the answers.

    Logs `train/loss`, `train/token_accuracy`; `val/loss`, `val/perplexity`, `val/token_accuracy`.

    Args:
        policy: the model to train.
        loss: of a token; validation is by the likelihood, whatever it is.
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of the stage's own draws; None: the run's.
    """

    batch_format = "tokens"

    def __init__(
        self,
        policy: ModelSpec,
        loss: SupervisedLoss = NLL(),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        schedule: Schedule = Schedule(),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(policy, optimizer, schedule, lr_scheduler, seed)
        self.save_hyperparameters()
        self.loss = loss
        self.policy: Policy | None = None
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = load_policy(self.model_spec)

    def forward(self, batch: TokenBatch) -> TokenScores:
        """Log-probability and arg-max match of every token that counts."""
        assert self.policy is not None
        return self.policy(batch)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        scores = self(batch)
        per_token = self.loss(scores.logprobs)
        loss = reduce_tokens(per_token, batch.mask, "token_mean", batch.total("tokens"))
        self.step_means.add(
            {"train/loss": per_token, "train/token_accuracy": scores.is_argmax.float()}, scored_tokens(batch.mask)
        )
        self.log_step_means(batch_idx, prog_bar=True)
        return loss * self.loss_scale

    def evaluate(self, batch: TokenBatch, batch_idx: int) -> None:
        scores = self(batch)
        mask = scored_tokens(batch.mask)
        tokens = mask.sum()
        self.val_loss.update(masked_mean(token_nll(scores.logprobs), mask), tokens)
        self.val_accuracy.update(masked_mean(scores.is_argmax.float(), mask), tokens)

    def evaluation_metrics(self) -> dict[str, Tensor]:
        loss, accuracy = self.val_loss.compute(), self.val_accuracy.compute()
        self.val_loss.reset()
        self.val_accuracy.reset()
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": accuracy}

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
