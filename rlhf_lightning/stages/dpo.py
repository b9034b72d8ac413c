"""Learning from preferences without a reward model: DPO and every loss of its family."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from rlhf_lightning.core.batches import Batch, PairBatch, RankedBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import (
    AnyPreferenceLoss,
    PairScores,
    PreferenceLoss,
    PreferenceLossOutput,
    RankedPreferenceLoss,
)
from rlhf_lightning.core.logprobs import token_kl
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.models.body import evaluating
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import MeasuredReference, Reference, ReferenceSync, make_reference
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages.base import RLHFModule
from rlhf_lightning.stages.pair_objective import PairObjective, loss_per_pair, summed_loss
from rlhf_lightning.stages.pair_scores import AnyReference, Measured, measure, measure_pairs
from rlhf_lightning.stages.reference_cache import measure_reference
from rlhf_lightning.stages.router_balance import Over
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
        share_prompts: compute each pair's prompt once for both answers: the same loss, and less work.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (TRL's); 0: none.
        router_aux_loss_over: it is taken over the whole optimiser step (as transformers takes it over a batch), or in
            each sequence (DeepSeek-V3).
        optimizer: called with the parameters.
        schedule: shape of the learning rate over the run.
        lr_scheduler: a scheduler class instead of `schedule`.
        seed: of the stage's own draws; None: the run's.

    References:
        Rafailov et al., Direct Preference Optimization, 2023. arXiv:2305.18290
        Gorbatovski et al., Learn Your Reference Model for Real Good Alignment (TR-DPO), 2024. arXiv:2404.09656
    """

    changed_by_steps = ("step_means", "_objective")

    def __init__(
        self,
        policy: ModelSpec,
        loss: AnyPreferenceLoss = DPO(),
        reference: ModelSpec | None = None,
        reference_sync: ReferenceSync | None = None,
        reference_cache: str | None = None,
        share_prompts: bool = False,
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
        if "opponent" in loss.needs:
            raise UserError(
                f"{type(loss).__name__} asks which answer of a pair the policy drew itself, and records do not say: "
                "use OnlineDPOModule with an opponent"
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

    @property
    def batch_format(self) -> Any:  # type: ignore[override]
        """Pairs, with a gold answer if the loss reads one, or rankings if it reads these."""
        if isinstance(self.loss, RankedPreferenceLoss):
            return "ranked"
        return "triples" if "gold" in self.loss.needs else "pairs"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return "reference" in self.loss.needs

    @property
    def loss(self) -> AnyPreferenceLoss:
        """What is minimised."""
        return self._loss

    @loss.setter
    def loss(self, loss: AnyPreferenceLoss) -> None:
        self._loss = loss
        # None: the loss reads rankings
        self._objective = PairObjective(loss) if isinstance(loss, PreferenceLoss) else None

    @property
    def objective(self) -> PairObjective:
        """What is done with the loss of pairs."""
        assert self._objective is not None, "the loss reads rankings"
        return self._objective

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
        super().setup(stage)
        if self.reference_cache is not None and self.needs_reference:
            measure_reference(self.trainer, self.reference_spec or self.model_spec, self.reference_cache)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        self.policy = load_policy(self.model_spec)
        if self.needs_reference and self.reference_cache is not None:
            self._frozen["reference"] = MeasuredReference()
        elif self.needs_reference:
            self._frozen["reference"] = make_reference(self.policy, self.reference_spec, sync=self.reference_sync)
        self.router_balance.watch(self.policy)

    @property
    def reference(self) -> AnyReference | None:
        """What the policy is compared with; None: the loss needs nothing."""
        return self._frozen.get("reference")

    def frozen_models(self) -> list[nn.Module]:
        return [] if self.reference is None else list(self.reference.own_models())

    def on_fit_start(self) -> None:
        self._move_reference()
        if self._objective is not None:
            self._objective.warn_of_cuts(self.trainer.accumulate_grad_batches * self.data_ranks)

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
            running=self.objective.running,
            share_prompts=self.share_prompts,
        )

    def measure_step(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Sums of what the loss wants the mean of over the step, from the policy as it is before the step."""
        known = super().measure_step(batches)
        if self._objective is None or not self._objective.loss.step_means:
            return known
        assert self.policy is not None
        if self.loss_draws:
            return {**known, **self._draw(batches)}
        sums = self._objective.no_sums()
        with torch.no_grad(), evaluating(self.policy), self.trainer.precision_plugin.forward_context():
            for batch in batches:
                assert isinstance(batch, PairBatch)
                for of_part in self.splitter.results(batch.to(self.device), self._sums_of):
                    sums = {name: value + of_part[name] for name, value in sums.items()}
        return {**known, **sums}

    @property
    def loss_draws(self) -> bool:
        """Whether the loss leaves out a part of each step's pairs."""
        return "drawn_pairs" in self.loss.needs

    def _draw(self, batches: Sequence[Batch]) -> dict[str, float]:
        assert self.policy is not None
        parts: list[tuple[PairBatch, PairScores]] = []
        with torch.no_grad(), evaluating(self.policy), self.trainer.precision_plugin.forward_context():
            for batch in batches:
                assert isinstance(batch, PairBatch)
                parts += self.splitter.results(batch.to(self.device), lambda part: (part, self(part)))
        seed = counter_seed(self.seed, "kept pairs", self.trainer.global_step)
        return self.objective.draw(parts, seed, self._of_all_ranks)

    def _sums_of(self, batch: PairBatch) -> dict[str, float]:
        return self.objective.sums(self(batch))

    def pair_loss(self, batch: PairBatch, pairs: PairScores) -> PreferenceLossOutput:
        """The loss of scored pairs; the means over the step that it reads come with the batch, else from the batch."""
        return self.objective(pairs, batch)

    def inseparable(self) -> str | None:
        return None if self._objective is None else self._objective.inseparable

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch | RankedBatch, batch_idx: int) -> Tensor:
        if isinstance(batch, RankedBatch):
            with self.router_balance.heard() as hearing:
                loss = self._rank(batch, self.step_means)
        else:
            with self.router_balance.heard() as hearing:
                pairs, _ = self._pairs(batch)
            output = self.pair_loss(batch, pairs)
            kept = self.objective.kept(batch)
            loss = self.objective.share(output, batch, kept)
            self.objective.count(self.step_means, pairs, output, kept)
            self.objective.count_statistics(output)
        if self.ends_step(batch_idx):
            metrics = summed_loss(self.step_means.take(self.add_over_ranks), "train/loss")
            shown = ("train/loss", "rewards/accuracies")
            self.log_dict({k: v for k, v in metrics.items() if k in shown}, prog_bar=True, batch_size=1)
            self.log_dict({k: v for k, v in metrics.items() if k not in shown}, batch_size=1)
            if self._objective is not None:
                self._objective.end_step(self.add_over_ranks)
        loss = loss + self.router_loss(hearing, batch, batch_idx)
        return loss * self.loss_scale

    def _rank(self, batch: RankedBatch, means: StepMeans) -> Tensor:
        assert self.policy is not None
        assert isinstance(self.loss, RankedPreferenceLoss)
        scores = measure(self.policy, self.reference, batch.completions, self.loss.needs).scores
        output = self.loss(scores, batch.groups, batch.ranks)
        per_prompt = {
            **loss_per_pair(output.per_prompt),
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

    def evaluate(self, batch: PairBatch | RankedBatch, batch_idx: int) -> None:
        if isinstance(batch, RankedBatch):
            self._rank(batch, self._evaluation)
            return
        pairs, measured = self._pairs(batch)
        self.objective.count(self._evaluation, pairs, self.pair_loss(batch, pairs))
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

    def evaluation_metrics(self) -> dict[str, Tensor]:
        metrics = summed_loss(self._evaluation.take(self.add_over_ranks), "loss")
        return {name.replace("/", "_"): value for name, value in metrics.items()}

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
        if self._objective is not None:
            checkpoint["running_means"] = self._objective.state_dict()
        if self.reference_sync is not None and isinstance(self.reference, Reference):
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._objective is not None:
            self._objective.load_state_dict(checkpoint.get("running_means", {}))
        if "reference" in checkpoint and isinstance(self.reference, Reference) and self.reference_sync is not None:
            self.reference.load_state_dict(checkpoint["reference"])

    def export(self, folder: str | Path) -> Path:
        assert self.policy is not None, "nothing to export before the model is built"
        return export_policy(self.policy, self.tokenizer, folder, card=self.card("Policy trained on preferences"))
