"""Learning from preferences without a reward model: DPO and every loss of its family."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlhf_lightning.core.batches import Batch, PairBatch, RankedBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import (
    CompletionScores,
    PairScores,
    PreferenceLoss,
    PreferenceLossOutput,
    RankedPreferenceLoss,
)
from rlhf_lightning.core.logprobs import token_kl
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.supervised import token_nll
from rlhf_lightning.models.body import evaluating
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import MeasuredReference, Reference, ReferenceSync, make_reference
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages.base import RLHFModule
from rlhf_lightning.stages.pair_scores import AnyReference, Measured, measure, measure_pairs
from rlhf_lightning.stages.reference_cache import measure_reference
from rlhf_lightning.stages.schedule import Schedule
from rlhf_lightning.stages.step_means import StepMeans


class DPOModule(RLHFModule):
    """Makes preferred answers likelier, compared with a reference and with the answers they were preferred to.

        DPO   -log sigma(beta h),  h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)

    and every other `PreferenceLoss` by `loss`; rankings of K answers by `ListwiseDPO`. The loss is the mean over the
    pairs (prompts) of the whole optimiser step, over micro-batches and ranks; a likelihood term is the mean over its
    chosen tokens. Chosen and rejected answers go through each model in one forward pass.

    Args:
        policy: the model to train.
        loss: decides what is minimised, whether there is a reference, and what records are read.
        reference: the model that the policy is compared with; None: the policy as it was at the start (with an adapter,
            the policy without it). Losses that need none build none.
        reference_sync: let the reference follow the policy (TR-DPO); None: it stays.
        reference_cache: folder where the reference's log-probabilities are kept: they are measured once, and training
            holds no second model; None: the reference is asked at every step.
        share_prompts: compute each pair's prompt once for both answers: the same loss, and less work where prompts are
            long.
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of the stage's own draws; None: the run's.

    References:
        Rafailov et al., Direct Preference Optimization, 2023. arXiv:2305.18290
        Gorbatovski et al., Learn Your Reference Model for Real Good Alignment (TR-DPO), 2024. arXiv:2404.09656
    """

    def __init__(
        self,
        policy: ModelSpec,
        loss: PreferenceLoss | RankedPreferenceLoss = DPO(),
        reference: ModelSpec | None = None,
        reference_sync: ReferenceSync | None = None,
        reference_cache: str | None = None,
        share_prompts: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6),
        schedule: Schedule = Schedule(),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(policy, optimizer, schedule, lr_scheduler, seed)
        if reference_sync is not None and reference_cache is not None:
            raise UserError(
                f"reference_sync moves the reference, and reference_cache={reference_cache!r} keeps what it said at "
                "the start: give one of them"
            )
        if reference_cache is not None and "ref_kl" in loss.needs:
            raise UserError(
                f"{type(loss).__name__} reads the KL over the whole vocabulary, and reference_cache="
                f"{reference_cache!r} keeps the log-probabilities of the records' own tokens alone: leave it out"
            )
        self.save_hyperparameters()
        self.loss = loss
        self.reference_spec = reference
        self.reference_sync = reference_sync
        self.reference_cache = reference_cache
        self.share_prompts = share_prompts
        self.policy: Policy | None = None
        self._frozen: dict[str, AnyReference] = {}
        """The reference, kept out of Module's registry: neither trained nor moved by Lightning."""
        self._evaluation = StepMeans()
        self._statistics = StepMeans()
        self._running: dict[str, float | Tensor] = dict.fromkeys(self._decays, 0.0)

    @property
    def batch_format(self) -> Any:  # type: ignore[override]
        """Pairs, or rankings if the loss reads these."""
        return "ranked" if isinstance(self.loss, RankedPreferenceLoss) else "pairs"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return "reference" in self.loss.needs

    @property
    def _decays(self) -> Mapping[str, float]:
        return self.loss.running_means if isinstance(self.loss, PreferenceLoss) else {}

    def inert_options(self) -> Iterable[tuple[str, str]]:
        yield from super().inert_options()
        if not self.needs_reference:
            for name in ("reference", "reference_sync", "reference_cache"):
                given = self.reference_spec if name == "reference" else getattr(self, name)
                if given is not None:
                    yield name, f"the loss {type(self.loss).__name__} needs no reference"
        if self.share_prompts and isinstance(self.loss, RankedPreferenceLoss):
            yield "share_prompts", "the loss reads rankings, not pairs"

    # ---- building --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.reference_cache is not None and self.needs_reference:
            measure_reference(self.trainer, self.reference_spec or self.model_spec, self.reference_cache)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        self.policy = load_policy(self.model_spec)
        if self.needs_reference and self.reference_cache is not None:
            self._frozen["reference"] = MeasuredReference()
        elif self.needs_reference:
            follows = self.reference_sync is not None
            self._frozen["reference"] = make_reference(self.policy, self.reference_spec, follows=follows)

    @property
    def reference(self) -> AnyReference | None:
        """What the policy is compared with; None: the loss needs nothing."""
        return self._frozen.get("reference")

    def on_fit_start(self) -> None:
        self._move_reference()
        cut = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if cut > 1 and "whole_batch" in self.loss.needs:
            rank_zero_warn(
                f"{type(self.loss).__name__} compares the pairs of one micro-batch of one rank: cut into {cut}, a step "
                "has another loss than as a whole. Use accumulate_grad_batches: 1 and one device for the whole"
            )

    def on_validation_start(self) -> None:
        self._move_reference()

    def on_test_start(self) -> None:
        self._move_reference()

    def on_predict_start(self) -> None:
        self._move_reference()

    def _move_reference(self) -> None:
        if self.reference is not None:
            self.reference.to(self.device)

    # ---- measuring -------------------------------------------------------------------------------------------------

    def forward(self, batch: PairBatch) -> PairScores:
        """What policy and reference say about the pairs of a batch."""
        return self._pairs(batch)[0]

    def _pairs(self, batch: PairBatch) -> tuple[PairScores, Measured]:
        assert self.policy is not None
        return measure_pairs(
            self.policy,
            self.reference,
            batch,
            self.loss.needs,
            pad_id=self.tokenizer.pad_token_id,
            running=self._running,
            share_prompts=self.share_prompts,
        )

    def measure_step(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Sums of what the loss wants the mean of over the step, from the policy as it is before the step."""
        if not isinstance(self.loss, PreferenceLoss) or not self.loss.step_means:
            return {}
        assert self.policy is not None
        sums = dict.fromkeys(self.loss.step_means, 0.0)
        with torch.no_grad(), evaluating(self.policy), self.trainer.precision_plugin.forward_context():
            for batch in batches:
                assert isinstance(batch, PairBatch)
                statistics = self.loss(self(batch.to(self.device))).statistics
                for name in sums:
                    sums[name] += float(statistics[name].double().sum())
        return {f"sum of {name}": value for name, value in sums.items()}

    def pair_loss(self, batch: PairBatch, pairs: PairScores) -> PreferenceLossOutput:
        """The loss of scored pairs; the means over the step that it reads come with the batch, else from the batch."""
        assert isinstance(self.loss, PreferenceLoss)
        names = self.loss.step_means
        if not names:
            return self.loss(pairs)
        if batch.totals is None:
            statistics = self.loss(pairs).statistics
            means: dict[str, float | Tensor] = {name: statistics[name].mean() for name in names}
        else:
            means = {name: batch.totals[f"sum of {name}"] / batch.total("pairs") for name in names}
        return self.loss(replace(pairs, step=means))

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch | RankedBatch, batch_idx: int) -> Tensor:
        if isinstance(batch, RankedBatch):
            loss = self._rank(batch, self.step_means)
        else:
            pairs, _ = self._pairs(batch)
            output = self.pair_loss(batch, pairs)
            loss = output.per_pair.sum() / batch.total("pairs")
            if output.per_chosen_token is not None:
                loss = loss + output.per_chosen_token.sum() / batch.total("chosen_tokens")
            _count(self.step_means, pairs, output)
            for name, values in output.statistics.items():
                self._statistics.add({name: values}, torch.ones_like(values, dtype=torch.bool))
        if self.ends_step(batch_idx):
            metrics = _summed_loss(self.step_means.take(self.add_over_ranks), "train/loss")
            shown = ("train/loss", "rewards/accuracies")
            self.log_dict({k: v for k, v in metrics.items() if k in shown}, prog_bar=True, batch_size=1)
            self.log_dict({k: v for k, v in metrics.items() if k not in shown}, batch_size=1)
            for name, mean in self._statistics.take(self.add_over_ranks).items():
                decay = self._decays[name]
                self._running[name] = decay * self._running[name] + (1 - decay) * mean
        return loss * self.loss_scale

    def _rank(self, batch: RankedBatch, means: StepMeans) -> Tensor:
        assert self.policy is not None
        assert isinstance(self.loss, RankedPreferenceLoss)
        scores = measure(self.policy, self.reference, batch.completions, self.loss.needs).scores
        output = self.loss(scores, batch.groups, batch.ranks)
        per_prompt = {
            _PAIRS: output.per_prompt,
            "rewards/accuracies": output.accuracy,
            "rewards/margins": output.margin,
        }
        means.add(per_prompt, torch.ones_like(output.per_prompt, dtype=torch.bool))
        return output.per_prompt.sum() / batch.total("prompts")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lets the reference follow after every so many steps."""
        super().optimizer_step(*args, **kwargs)
        if self.reference_sync is None or not self.needs_reference:
            return
        assert self.policy is not None
        assert isinstance(self.reference, Reference)
        # the trainer counts the step afterwards
        self.reference_sync.after_step(self.trainer.global_step + 1, self.reference, self.policy)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: PairBatch | RankedBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: PairBatch | RankedBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: PairBatch | RankedBatch) -> None:
        if isinstance(batch, RankedBatch):
            self._rank(batch, self._evaluation)
            return
        pairs, measured = self._pairs(batch)
        _count(self._evaluation, pairs, self.pair_loss(batch, pairs))
        if measured.ref_hidden is not None and self._has_exact_kl:
            assert self.policy is not None
            assert isinstance(self.reference, Reference)
            mask = measured.scores.mask
            heads = self.policy.head(), self.reference.policy.head()
            self._evaluation.add({"kl": token_kl(measured.hidden, measured.ref_hidden, mask, *heads)}, mask)

    @property
    def _has_exact_kl(self) -> bool:
        assert self.policy is not None
        return self.policy.head().softcap is None

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        metrics = _summed_loss(self._evaluation.take(self.add_over_ranks), "loss")
        # added over ranks already; sync_dist only tells Lightning so
        named = {f"{split}/{name.replace('/', '_')}": value for name, value in metrics.items()}
        self.log_dict(named, prog_bar=split == "val", sync_dist=True)

    def predict_step(self, batch: PairBatch | RankedBatch, batch_idx: int) -> Tensor:
        """Implicit rewards: of pairs [pairs, 2], chosen and rejected; of rankings [completions]."""
        if isinstance(batch, PairBatch):
            output = self.pair_loss(batch, self(batch))
            return torch.stack((output.chosen_rewards, output.rejected_rewards), dim=-1)
        assert self.policy is not None
        assert isinstance(self.loss, RankedPreferenceLoss)
        scores = measure(self.policy, self.reference, batch.completions, self.loss.needs).scores
        return self.loss(scores, batch.groups, batch.ranks).rewards

    # ---- state and export ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["running_means"] = {name: float(value) for name, value in self._running.items()}
        if self.reference_sync is not None and isinstance(self.reference, Reference):
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        known = {name: torch.tensor(value) for name, value in checkpoint.get("running_means", {}).items()}
        self._running = {name: known.get(name, value) for name, value in self._running.items()}
        if "reference" in checkpoint and isinstance(self.reference, Reference) and self.reference_sync is not None:
            self.reference.load_state_dict(checkpoint["reference"])

    def export(self, folder: str | Path) -> Path:
        assert self.policy is not None, "nothing to export before the model is built"
        return export_policy(self.policy, self.tokenizer, folder, card=self.card("Policy trained on preferences"))


_PAIRS, _TOKENS = "loss per pair", "loss per chosen token"


def _count(means: StepMeans, pairs: PairScores, output: PreferenceLossOutput) -> None:
    """Add a batch's metrics: each pair, and each chosen token, with equal weight."""
    margins = output.chosen_rewards - output.rejected_rewards
    per_pair = {
        _PAIRS: output.per_pair,
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": 0.5 * (margins.sign() + 1),
        "logps/chosen": pairs.chosen.total,
        "logps/rejected": pairs.rejected.total,
        **_displacement(pairs.chosen, pairs.rejected),
    }
    means.add(per_pair, torch.ones_like(margins, dtype=torch.bool))
    per_token = {"logps/chosen_nll": token_nll(pairs.chosen.logprobs)}
    if output.per_chosen_token is not None:
        per_token[_TOKENS] = output.per_chosen_token
    means.add(per_token, pairs.chosen.mask)


def _displacement(chosen: CompletionScores, rejected: CompletionScores) -> dict[str, Tensor]:
    """How far answers have moved from the reference; nothing without one."""
    if chosen.ref_logprobs is None:
        return {}
    moved = chosen.log_ratio.detach()
    return {
        "displacement/chosen": moved,
        "displacement/rejected": rejected.log_ratio,
        "displacement/fell_frac": (moved < 0).float(),
    }


def _summed_loss(metrics: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Both terms of the loss as one."""
    if not metrics:
        return {}
    per_pair, per_token = metrics.pop(_PAIRS), metrics.pop(_TOKENS, 0.0)
    return {name: per_pair + per_token, **metrics}
