"""Learning from single completions that somebody called good or bad: KTO, BCO and unpaired APO-zero."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from rlhf_lightning.core.batches import Batch, TokenBatch, UnpairedBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, UnpairedLoss
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.items import UnpairedItem
from rlhf_lightning.losses.unpaired import KTO
from rlhf_lightning.models.body import evaluating
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import MeasuredReference, Reference, make_reference
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages.base import RLHFModule
from rlhf_lightning.stages.reference_cache import measure_reference
from rlhf_lightning.stages.router_balance import Over
from rlhf_lightning.stages.schedule import Schedule

log = logging.getLogger(__name__)


class KTOModule(RLHFModule):
    """Makes desirable completions likelier than the reference does, and undesirable ones less likely.

        r(x, y) = beta (log pi(y|x) - log pi_ref(y|x))
        KTO               w_D (1 - sigma(r - beta KL)) and w_U (1 - sigma(beta KL - r))
        APOZeroUnpaired   the same with KL = 0
        BCO               -log sigma(r - delta) and -log sigma(delta - r), delta a running mean of r

    KL = max(0, mean of log pi(y'|x) - log pi_ref(y'|x)) over all records of the optimiser step, over micro-batches and
    ranks, with y' a completion that belongs to another prompt; it carries no gradient. It is measured by the policy as
    it is before the step, so the loss does not depend on how the step is cut. Which y' a prompt gets is settled once
    for the whole data set (`data.mismatch`): neither batch size nor shuffling nor the order of the file changes it.

    The loss is the mean over the completions of the whole optimiser step.

    Args:
        policy: the model to train.
        loss: KTO, APOZeroUnpaired or BCO, with their beta and weights.
        reference: the model that the policy is compared with; None: the policy as it was at the start.
        reference_cache: folder where the reference's log-probabilities are kept: they are measured once, and training
            holds no second model; None: the reference is asked at every step.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (TRL's); 0: none.
        router_aux_loss_over: it is taken over the whole optimiser step (as transformers takes it over a batch), or in
            each sequence (DeepSeek-V3).
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of the stage's own draws; None: the run's.

    References:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, 2024. arXiv:2402.01306
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, 2024. arXiv:2404.04656
        D'Oosterlinck et al., Anchored Preference Optimization, 2024. arXiv:2408.06266
    """

    changed_by_steps = ("step_means", "_rewards")

    def __init__(
        self,
        policy: ModelSpec,
        loss: UnpairedLoss = KTO(),
        reference: ModelSpec | None = None,
        reference_cache: str | None = None,
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6),
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
        self.reference_spec = reference
        self.reference_cache = reference_cache
        self.policy: Policy | None = None
        self._frozen: dict[str, Reference | MeasuredReference] = {}
        """The reference, kept out of Module's registry: neither trained nor saved."""
        self._rewards = RewardMean()
        self._evaluated: list[Tensor] = []
        """Of every validation batch so far: log-ratios, labels and log-ratios of mismatched completions [3, batch]."""

    @property
    def batch_format(self) -> Any:  # type: ignore[override]
        """Labelled completions; with mismatched ones where the loss estimates a KL from them."""
        return "mismatched" if self.loss.baseline == "mismatched_kl" else "unpaired"

    # ---- building --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self._check_labels()
        if self.reference_cache is not None:
            measure_reference(self.trainer, self.reference_spec or self.model_spec, self.reference_cache)

    def _check_labels(self) -> None:
        """Refuses records of one kind; says so where the weights leave the two kinds far from even."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RLHFDataModule):
            return
        labels = [item.desirable for item in data.items("train") if isinstance(item, UnpairedItem)]
        desirable = sum(labels)
        undesirable = len(labels) - desirable
        if not desirable or not undesirable:
            kind, remedy = ("desirable", "SFTModule") if desirable else ("undesirable", "records that are desirable")
            raise UserError(
                f"data.train: all its {len(labels)} records are {kind} (label), so there is nothing to tell them from: "
                f"give records of both kinds, or use {remedy}"
            )
        weights = getattr(self.loss, "desirable_weight", 1.0), getattr(self.loss, "undesirable_weight", 1.0)
        ratio = weights[0] * desirable / max(weights[1] * undesirable, 1e-12)
        if isinstance(self.loss, KTO) and not 0.75 <= ratio <= 4 / 3:
            fitting = weights[1] * undesirable / desirable
            log.warning(
                f"{desirable} desirable and {undesirable} undesirable records with weights {weights[0]:g} and "
                f"{weights[1]:g}: the paper's eq. 8 asks for desirable_weight from {fitting:.3g} to "
                f"{4 / 3 * fitting:.3g} beside this undesirable_weight"
            )

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = load_policy(self.model_spec)
            self._frozen["reference"] = (
                make_reference(self.policy, self.reference_spec)
                if self.reference_cache is None
                else MeasuredReference()
            )
            self.router_balance.watch(self.policy)

    @property
    def reference(self) -> Reference | MeasuredReference:
        return self._frozen["reference"]

    def frozen_models(self) -> list[nn.Module]:
        return list(self.reference.own_models())

    def on_fit_start(self) -> None:
        self.reference.to(self.device)

    def on_validation_start(self) -> None:
        self.reference.to(self.device)

    def on_test_start(self) -> None:
        self.reference.to(self.device)

    def on_predict_start(self) -> None:
        self.reference.to(self.device)

    # ---- measuring -------------------------------------------------------------------------------------------------

    def forward(self, completions: TokenBatch) -> CompletionScores:
        """What policy and reference say of every completion."""
        assert self.policy is not None
        logprobs = self.policy(completions).logprobs
        return CompletionScores(logprobs, completions.mask, self.reference(completions).logprobs)

    @torch.no_grad()
    def _mismatched_log_ratios(self, batch: UnpairedBatch) -> Tensor:
        assert self.policy is not None
        assert batch.mismatched is not None
        with evaluating(self.policy):
            return self(batch.mismatched).log_ratio

    def measure_step(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """The sum behind the step's KL, from the policy as it is before the step."""
        known = super().measure_step(batches)
        if self.loss.baseline != "mismatched_kl":
            return known
        sums = []
        with self.trainer.precision_plugin.forward_context():
            for batch in batches:
                assert isinstance(batch, UnpairedBatch)
                of_parts = self.splitter.results(batch.to(self.device), self._mismatched_log_ratios)
                sums += [ratios.sum() for ratios in of_parts]
        # one wait for the device
        return {**known, "mismatched_log_ratio": float(torch.stack(sums).sum())}

    def baseline(self, batch: UnpairedBatch) -> Tensor:
        """What the loss compares completions with, the same for the whole optimiser step []."""
        log_ratio = 0.0
        if self.loss.baseline == "mismatched_kl" and batch.totals is not None:
            log_ratio = batch.totals["mismatched_log_ratio"]
        elif self.loss.baseline == "mismatched_kl":
            log_ratio = float(self._mismatched_log_ratios(batch).sum())
        return torch.tensor(self._baseline_at(log_ratio / batch.total("sequences")), device=batch.labels.device)

    def _baseline_at(self, mean_log_ratio: float) -> float:
        if self.loss.baseline == "mismatched_kl":
            return max(mean_log_ratio, 0.0)
        if self.loss.baseline == "mean_reward":
            return self._rewards.mean(balanced=self.loss.balanced_baseline)
        return 0.0

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: UnpairedBatch, batch_idx: int) -> Tensor:
        with self.router_balance.heard() as hearing:
            scores = self(batch.completions)
        baseline = self.baseline(batch)
        per_completion = self.loss(scores.log_ratio, batch.labels, baseline)
        loss = per_completion.sum() / batch.total("sequences")
        rewards = self.loss.beta * scores.log_ratio.detach()
        self.step_means.add({"train/loss": per_completion}, torch.ones_like(batch.labels))
        for name, of_kind in (("chosen", batch.labels), ("rejected", ~batch.labels)):
            self.step_means.add({f"rewards/{name}": rewards, f"logps/{name}": scores.total}, of_kind)
        if self.loss.baseline == "mean_reward":
            self._rewards.add(rewards, batch.labels)
        if self.ends_step(batch_idx):
            self._finish_step(batch, baseline)
        loss = loss + self.router_loss(hearing, batch, batch_idx)
        return loss * self.loss_scale

    def _finish_step(self, batch: UnpairedBatch, baseline: Tensor) -> None:
        metrics = self.step_means.take(self.add_over_ranks)
        desirable, sequences = (batch.total(name, at_least=0.0) for name in ("desirable", "sequences"))
        metrics |= {"train/sequences": sequences, "train/desirable_frac": desirable / sequences}
        if 0 < desirable < sequences:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        else:  # a mean over nothing is not 0
            missing = "chosen" if desirable == 0 else "rejected"
            metrics = {name: value for name, value in metrics.items() if not name.endswith(f"/{missing}")}
        if self.loss.baseline == "mismatched_kl":
            metrics["kl/mismatched"] = baseline
        elif self.loss.baseline == "mean_reward":
            metrics["rewards/shift"] = baseline
            self._rewards.take(self.add_over_ranks)
        shown = ("train/loss", "rewards/margins")
        self.log_dict({k: v for k, v in metrics.items() if k in shown}, prog_bar=True, batch_size=1)
        self.log_dict({k: v for k, v in metrics.items() if k not in shown}, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward_sums"] = self._rewards.sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._rewards.sums = list(checkpoint.get("reward_sums", self._rewards.sums))

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, batch: UnpairedBatch, batch_idx: int) -> None:
        ratios = self(batch.completions).log_ratio
        mismatched = self._mismatched_log_ratios(batch) if batch.mismatched is not None else torch.zeros_like(ratios)
        self._evaluated.append(torch.stack((ratios, batch.labels.to(ratios), mismatched)).float())

    def evaluation_metrics(self) -> dict[str, float]:
        """The whole set is one step: its KL is that of all its records, whatever the batch size."""
        if not self._evaluated:
            return {}
        ratios, labels, mismatched = torch.cat(self._evaluated, 1).unbind()
        self._evaluated = []
        count, log_ratio = self.add_over_ranks(
            torch.stack((torch.tensor(float(len(ratios))), mismatched.sum().cpu())).double()
        ).tolist()
        baseline = self._baseline_at(log_ratio / count)
        desirable = labels > 0.5
        per_completion = self.loss(ratios, desirable, torch.tensor(baseline, device=ratios.device))
        rewards = self.loss.beta * ratios
        parts = (per_completion, rewards * desirable, desirable, rewards * ~desirable, ~desirable)
        sums = self.add_over_ranks(torch.stack([part.double().sum() for part in parts]).cpu())
        loss, chosen, num_chosen, rejected, num_rejected = sums.tolist()
        metrics = {"loss": loss / count}
        if num_chosen:
            metrics["rewards_chosen"] = chosen / num_chosen
        if num_rejected:
            metrics["rewards_rejected"] = rejected / num_rejected
        if num_chosen and num_rejected:
            metrics["rewards_margins"] = chosen / num_chosen - rejected / num_rejected
        if self.loss.baseline == "mismatched_kl":
            metrics["kl"] = baseline
        return metrics

    def predict_step(self, batch: UnpairedBatch, batch_idx: int) -> Tensor:
        """The reward that the policy implies, of every completion [batch]."""
        return self.loss.beta * self(batch.completions).log_ratio

    # ---- export ----------------------------------------------------------------------------------------------------

    def export(self, folder: str | Path) -> Path:
        assert self.policy is not None, "nothing to export before the model is built"
        return export_policy(
            self.policy, self.tokenizer, folder, card=self.card("Model trained on labelled completions")
        )


class RewardMean:
    """The mean reward over all optimiser steps that are finished, of each kind of completion."""

    def __init__(self) -> None:
        self.sums = [0.0, 0.0, 0.0, 0.0]
        """Sum of rewards and number of desirable completions, then of undesirable ones."""
        self._step: Tensor | None = None

    def __copy__(self) -> "RewardMean":
        same = RewardMean()
        same.sums, same._step = list(self.sums), self._step
        return same

    def add(self, rewards: Tensor, labels: Tensor) -> None:
        """Count a micro-batch of the present step."""
        kinds = (labels, ~labels)
        parts = torch.stack([part.sum() for kind in kinds for part in (torch.where(kind, rewards, 0.0), kind.float())])
        self._step = parts.double() if self._step is None else self._step + parts

    def take(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """The step is over."""
        assert self._step is not None
        self.sums = [a + b for a, b in zip(self.sums, add_over_ranks(self._step).tolist(), strict=True)]
        self._step = None

    def mean(self, *, balanced: bool) -> float:
        """Of all completions; balanced: half-way between the means of the two kinds. 0 before there are any."""
        desirable, num_desirable, undesirable, num_undesirable = self.sums
        if balanced and num_desirable and num_undesirable:
            return (desirable / num_desirable + undesirable / num_undesirable) / 2
        return (desirable + undesirable) / max(num_desirable + num_undesirable, 1.0)
