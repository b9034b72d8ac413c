"""What every stage shares: optimiser, schedule, exact averaging over micro-batches and ranks, exact resume, export."""

import copy
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.batches import Batch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.failpoints import failpoint
from rlhf_lightning.core.interfaces import BatchFormat
from rlhf_lightning.models.export import ModelCard
from rlhf_lightning.models.loading import context_length, load_tokenizer, not_finite
from rlhf_lightning.models.quantized import check_trainable
from rlhf_lightning.models.routing import Hearing
from rlhf_lightning.models.sharded import plain_name
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.parallel import FSDP2Strategy as FSDP2Strategy  # importing it makes `strategy: fsdp2` known
from rlhf_lightning.parallel.sharded_checkpoint import guard
from rlhf_lightning.parallel.strategy import check_strategy
from rlhf_lightning.stages.router_balance import Over, RouterBalance
from rlhf_lightning.stages.schedule import Schedule
from rlhf_lightning.stages.splitting import Splitter
from rlhf_lightning.stages.step_loader import StepLoader
from rlhf_lightning.stages.step_means import StepMeans


class RLHFModule(L.LightningModule, ABC):
    """A stage of training. Subclasses build their networks in `configure_model` and their loss in `training_step`.

    A subclass's `training_step` returns its loss already divided by the batch's totals (the denominators of the whole
    optimiser step) and multiplied by `self.loss_scale`, which undoes Lightning's division by the number of
    micro-batches and the averaging over ranks.

    Args:
        model_spec: the model whose tokenizer the stage uses.
        optimizer: called with the parameter groups.
        schedule: shape of the learning rate over the run.
        lr_scheduler: called with the optimiser instead of `schedule`, for shapes that it lacks; asked after each
            optimiser step, or, if it watches a metric, after each validation.
        seed: of every draw the stage makes; None: the run's seed_everything.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts; 0: none.
        router_aux_loss_over: what that loss is taken over; see `RouterBalance`.
    """

    batch_format: ClassVar[BatchFormat]
    changed_by_steps: ClassVar[tuple[str, ...]] = ("step_means",)
    """Attributes that `training_step` changes, for `copy.copy`: put back where a step has to be taken anew."""

    def __init__(
        self,
        model_spec: ModelSpec,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int | None,
        *,
        router_aux_loss_coef: float = 0.0,
        router_aux_loss_over: Over = "step",
    ) -> None:
        super().__init__()
        check_trainable(model_spec)
        self.model_spec = model_spec
        self.optimizer = optimizer
        self.schedule = schedule
        self.lr_scheduler = lr_scheduler
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._loader: Any = None
        self._saved_progress: Mapping[str, Any] | None = None
        self._optimizer_options: list[dict[str, Any]] = []
        """Numbers that the optimiser's groups were made with: learning rate, weight decay and the like."""
        self.step_means = StepMeans()
        self.splitter = Splitter(self)
        self.router_balance = RouterBalance(router_aux_loss_coef, router_aux_loss_over)
        self.figures: dict[str, float] = {}
        """Numbers of the last validation, for the model card."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the stage's model; loaded when first asked for. Knows the length of the shortest context."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model_spec)
            known = [length for spec in self.readers() if (length := context_length(spec))]
            self._tokenizer.model_max_length = min([*known, self._tokenizer.model_max_length])
        return self._tokenizer

    def readers(self) -> list[ModelSpec]:
        """The models that read whole rows: none of them must be longer than the shortest context."""
        return [self.model_spec]

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer.strategy)
        guard(self.trainer.strategy)

    @abstractmethod
    def export(self, folder: str | Path) -> Path:
        """Write what was trained as a plain Hugging Face folder. One process calls it, all if weights are sharded."""

    def inert_options(self) -> Iterable[tuple[str, str]]:
        """Options set away from their default that the rest of the configuration leaves without effect, and why."""
        if self.lr_scheduler is not None and self.schedule != Schedule():
            yield "schedule", "lr_scheduler replaces it"
        if self.router_balance.over != "step" and not self.router_balance.enabled:
            yield "router_aux_loss_over", "router_aux_loss_coef is 0"

    @property
    def reads_pretraining(self) -> bool:
        """Whether `data.pretraining` is trained on beside the records."""
        return False

    def frozen_models(self) -> list[nn.Module]:
        """Models that are neither trained nor saved, and so not among the module's own; sharded as those are."""
        return []

    # ---- averaging -------------------------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """What makes a share of the step's loss survive Lightning's and the ranks' averaging unchanged."""
        if self._trainer is None:
            return 1.0
        return float(self.trainer.accumulate_grad_batches * self.data_ranks)

    @property
    def tensor_parallel(self) -> FSDP2Strategy | None:
        """The strategy, if under it several processes read the same records."""
        strategy = None if self._trainer is None else getattr(self._trainer, "strategy", None)
        return strategy if isinstance(strategy, FSDP2Strategy) and strategy.tensor_parallel_size > 1 else None

    @property
    def data_ranks(self) -> int:
        """How many processes, or groups of them, read records of their own."""
        if self._trainer is None:
            return 1
        size = 1 if self.tensor_parallel is None else self.tensor_parallel.tensor_parallel_size
        return int(self.trainer.world_size) // size

    @property
    def data_rank(self) -> int:
        """Which of them this process belongs to: processes of one number draw and sample alike."""
        size = 1 if self.tensor_parallel is None else self.tensor_parallel.tensor_parallel_size
        return int(self.global_rank) // size

    def add_over_ranks(self, vector: Tensor) -> Tensor:
        """The sum of a vector over all that read different records, on every rank."""
        if self.data_ranks == 1:
            return vector
        summed = vector.to(self.device, torch.float64 if self.device.type != "mps" else torch.float32)
        group = None
        if self.tensor_parallel is not None:
            group = self.tensor_parallel.device_mesh["data_parallel"].get_group()
        torch.distributed.all_reduce(summed, group=group)
        return summed.to(vector.device, vector.dtype)

    def ends_step(self, batch_idx: int) -> bool:
        """Whether a micro-batch is the last of its optimiser step."""
        if self.splitter.more_follow:  # only a part of it was given
            return False
        done = batch_idx + 1
        return done % self.trainer.accumulate_grad_batches == 0 or done == self.trainer.num_training_batches

    def log_step_means(self, batch_idx: int, *, prog_bar: bool = False) -> None:
        """With the last micro-batch of an optimiser step, log the means of all that was added to `step_means`."""
        if self.ends_step(batch_idx):
            self.log_dict(self.step_means.take(self.add_over_ranks), prog_bar=prog_bar, batch_size=1)

    def router_loss(self, hearing: Hearing | None, batch: Batch, batch_idx: int) -> Tensor | float:
        """This micro-batch's share of the load-balancing loss, weighted; its metrics logged as those of `step_means`.

        Args:
            hearing: what `router_balance.heard` gave, after the model has run on the batch.
        """
        share = self.router_balance.share(hearing, batch)
        if self.router_balance.enabled and self.ends_step(batch_idx):
            self.log_dict(self.router_balance.take(self.add_over_ranks), batch_size=1)
        return share

    # ---- out of memory ---------------------------------------------------------------------------------------------

    def step_state(self) -> dict[str, Any]:
        """What a training step changes, beside gradients, as it is now."""
        return {name: copy.copy(getattr(self, name)) for name in (*self.changed_by_steps, "router_balance")}

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Go back to where `step_state` was taken."""
        for name, value in state.items():
            setattr(self, name, copy.copy(value))

    def ready_to_cut(self, batch: Batch) -> Batch:
        """A micro-batch that is going to be cut, with all in its totals that its parts ask for."""
        if self.router_balance.knows(batch):
            return batch
        return batch.with_totals({**(batch.totals or {}), **self.router_balance.measure(self, [batch], cut=True)})

    def inseparable(self) -> str | None:
        """Why a micro-batch must not be cut, in words; None: its parts have the same loss."""
        return None

    def smaller_batches(self, purpose: str, batch: Batch, pieces: int) -> str:
        """Options that let a run begin with `batch` in so many pieces, where `purpose` did not fit as a whole."""
        options = getattr(getattr(self.trainer, "datamodule", None), "options", {})
        name = "tokens_per_batch" if options.get("tokens_per_batch") else "batch_size"
        size = max((options.get(name) or batch.num_units) // pieces, 1)
        accumulate = pieces * self.trainer.accumulate_grad_batches
        return f"data.{name}={size} and trainer.accumulate_grad_batches={accumulate}"

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.splitter.backward(loss, lambda whole: super(RLHFModule, self).backward(whole, *args, **kwargs))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.splitter.keeps_gradients:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # not only before the next backward pass: a rollout, a validation and a forward pass need their memory
        if self.ends_step(batch_idx):
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    # ---- loader and its state --------------------------------------------------------------------------------------

    def wrap_train_dataloader(self, loader: Iterable[Any]) -> Iterable[Any]:
        """What the datamodule's training loader is passed through: here, batches learn their step's totals."""
        self._loader = StepLoader(
            loader,
            accumulate=self.trainer.accumulate_grad_batches,
            limit=lambda: self.trainer.num_training_batches,
            add_over_ranks=self.add_over_ranks,
            epoch=lambda: self.trainer.current_epoch,
            measure=self.measure_step,
        )
        return self._loader

    def measure_step(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Sums over an optimiser step's micro-batches of this rank, taken before its first one is trained on.

        They join the totals of its batches, added over ranks. A stage with sums of its own adds them to these.
        """
        cut = any(self.splitter.cuts(batch) for batch in batches)
        return self.router_balance.measure(self, batches, cut=cut)

    def on_train_start(self) -> None:
        # here rather than on load: the loader may be built before or after the checkpoint is read
        if self._saved_progress is not None and self._loader is not None:
            self._loader.restore(self._saved_progress)
        self._saved_progress = None
        self._begin_next_epoch()
        self._apply_optimizer_options()
        self._check_watching()
        self.splitter.attach()

    def on_train_end(self) -> None:
        self.splitter.detach()
        if 0 < self.trainer.global_step < self.trainer.log_every_n_steps:
            self._log_last_step()

    def _log_last_step(self) -> None:
        """Lightning logs every so many steps, and would leave nothing of a run that is shorter."""
        values = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.trainer.global_step - 1)

    def _begin_next_epoch(self) -> None:
        """Resumed after the last batch of an epoch, Lightning counts it as done and takes the next for its rest.

        The next one would never be counted as begun, and a checkpoint at its end could not be resumed. Where there is a
        `max_steps`, an epoch that ended before the checkpoint was written would end once more, and the next be left
        out.
        """
        loop = self.trainer.fit_loop
        if loop.restarted_mid_epoch and loop.epoch_progress.current.completed == loop.epoch_progress.current.ready:
            loop.reset_restart_stage()
        if loop.restarted_on_epoch_end:
            loop.epoch_progress.increment_completed()
            loop._restarting = False  # the property would say otherwise where there is a `max_steps`
            loop.epoch_loop.restarting = False
            loop.reset_restart_stage()
            loop.epoch_loop.reset_restart_stage()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stages"] = self._stages()
        # every rank's progress travels in rank 0's file
        if self._loader is not None:
            checkpoint["loader_progress"] = self._of_all_ranks(self._loader.progress())
            checkpoint["data_ranks"] = self.data_ranks
        # objects would make the file a pickle that torch refuses to load; the command line stores plain values
        if "hyper_parameters" in checkpoint:
            plain = {k: v for k, v in checkpoint["hyper_parameters"].items() if is_plain(v)}
            checkpoint["hyper_parameters"] = plain

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite(checkpoint.get("state_dict", {}))
        of_ranks = checkpoint.get("loader_progress")
        if of_ranks is None or self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        saved, ours = checkpoint.get("stages") or self._stages(), self._stages()
        if ours[0] not in saved and saved[0] not in ours:
            raise UserError(
                f"the checkpoint was written by {saved[0]} and cannot be gone on with by {ours[0]}: use a folder of "
                "its own (--trainer.default_root_dir), and start from the exported model (hf/ of that run)"
            )
        if len(of_ranks) != self.trainer.world_size:
            raise UserError(
                f"the checkpoint was written by {len(of_ranks)} processes and is resumed by {self.trainer.world_size}: "
                "use the same number, or start a new run from the exported model"
            )
        then = checkpoint.get("data_ranks", len(of_ranks))
        if then != self.data_ranks:
            raise UserError(
                f"the checkpoint was written where {then} of {len(of_ranks)} processes read records of their own, and "
                f"here {self.data_ranks} do: resume with the same tensor_parallel_size, or start a new run from the "
                "exported model"
            )
        self._saved_progress = of_ranks[self.trainer.global_rank]

    def _check_finite(self, state: Mapping[str, Tensor]) -> None:
        """Raise for a checkpoint of a run that went wrong before it was written."""
        names = {plain_name(name) for name, _ in self.named_parameters()}  # buffers may hold what they like
        if self.model_spec.check_finite and (bad := not_finite((n, x) for n, x in state.items() if n in names)):
            raise UserError(
                f"the checkpoint has weights that are NaN or infinite: {bad}. Go on from an earlier one (--resume "
                "PATH), with a lower learning rate or gradient_clip_val; check_finite: false of the model does not look"
            )

    def _stages(self) -> list[str]:
        """The names of this class and of the stages that it is one of."""
        return [cls.__name__ for cls in type(self).__mro__ if issubclass(cls, RLHFModule)]

    def _of_all_ranks(self, value: Any) -> list[Any]:
        if self.trainer.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    # ---- optimiser -------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of trainable parameters; a group may name its own options."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameter_groups())  # type: ignore[arg-type]
        self._optimizer_options = [
            {name: value for name, value in group.items() if name != "params" and is_number(value)}
            for group in optimizer.param_groups
        ]
        if self.lr_scheduler is not None:
            watching = self.lr_scheduler(optimizer)
            if not isinstance(watching, ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": watching, "interval": "step"}}
            # Lightning would ask it at ends of epochs alone: `never` leaves that to each validation
            never = {"scheduler": watching, "monitor": monitor_of(watching), "frequency": sys.maxsize}
            return {"optimizer": optimizer, "lr_scheduler": never}
        if self.schedule == Schedule():
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        failpoint("step.before")
        super().optimizer_step(*args, **kwargs)
        failpoint("step.after")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        failpoint("step.before_update")

    def _check_watching(self) -> None:
        """Raise if a scheduler watches validation, and there is none."""
        watching = [config for config in self.trainer.lr_scheduler_configs if config.reduce_on_plateau]
        if watching and not sum(self.trainer.num_val_batches):
            raise UserError(
                f"lr_scheduler.init_args.monitor={watching[0].monitor!r} is looked at after each validation, and there "
                "is none: give data.val or data.val_frac, or use schedule"
            )

    def _apply_optimizer_options(self) -> None:
        """A resumed optimiser comes with the learning rate and other numbers of its checkpoint; those given now win."""
        if self.lr_scheduler is not None or len(self.trainer.optimizers) != 1:
            return  # that scheduler's state is what it makes of the numbers
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for index, options in enumerate(self._optimizer_options):
            group, factor = self.trainer.optimizers[0].param_groups[index], 1.0
            group.update({name: value for name, value in options.items() if name != "lr"})
            for scheduler in schedulers:
                group["initial_lr"] = scheduler.base_lrs[index] = options["lr"]
                factor = scheduler.lr_lambdas[index](scheduler.last_epoch)  # type: ignore[attr-defined]
            group["lr"] = options["lr"] * factor

    # ---- export ----------------------------------------------------------------------------------------------------

    def card(self, title: str) -> ModelCard:
        """What the export says about the run it came from."""
        config = ""
        if self._trainer is not None:
            saved = Path(self.trainer.default_root_dir) / "config.yaml"
            config = saved.read_text() if saved.is_file() else ""
        return ModelCard(
            title=title,
            stage=type(self).__name__,
            config_yaml=config,
            figures=self.figures,
            base_model=self.model_spec.path,
        )

    def keep_figures(self) -> None:
        """Remember the epoch's validation metrics for the model card."""
        metrics = self.trainer.callback_metrics
        self.figures = {k: float(v) for k, v in metrics.items() if k.startswith(("val/", "rollout/"))}

    # ---- evaluation ------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, batch: Any, batch_idx: int) -> None:
        """Take note of a held-out batch, of the validation or the test that is under way."""

    @abstractmethod
    def evaluation_metrics(self) -> Mapping[str, float | Tensor]:
        """What all ranks took note of, as means by name, and then forgot; empty if that was nothing."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")
        if not self.trainer.sanity_checking:
            self.keep_figures()
            self._show_to_schedulers()

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        metrics = {f"{split}/{name}": value for name, value in self.evaluation_metrics().items()}
        # equal on all ranks already; sync_dist only tells Lightning so
        self.log_dict(metrics, prog_bar=split == "val", sync_dist=True)

    def _show_to_schedulers(self) -> None:
        """Schedulers that watch a metric see that of this validation; before callbacks save what they are."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = self.trainer.callback_metrics
        for config in self.trainer.lr_scheduler_configs:
            if not config.reduce_on_plateau:
                continue
            if config.monitor not in metrics:
                near = get_close_matches(str(config.monitor), list(metrics), n=1)
                raise UserError(
                    f"lr_scheduler.init_args.monitor={config.monitor!r}: validation logs no such metric"
                    + (f", the nearest name is {near[0]!r}" if near else "")
                    + f"; there are {', '.join(sorted(metrics)) or 'none'}"
                )
            config.scheduler.step(float(metrics[config.monitor]))  # type: ignore[arg-type]


def monitor_of(scheduler: ReduceLROnPlateau) -> str:
    """The metric that a scheduler watches.

    Raises:
        UserError: it names none, as torch's own class cannot.
    """
    monitor = getattr(scheduler, "monitor", None)
    if monitor is None:
        raise UserError(
            "lr_scheduler.class_path=torch.optim.lr_scheduler.ReduceLROnPlateau names no metric to watch: use "
            "lightning.pytorch.cli.ReduceLROnPlateau with init_args: {monitor: val/loss}"
        )
    return str(monitor)


def is_number(value: Any) -> bool:
    """Whether an option is a number or a tuple of them (a pair of betas); switches are none."""
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)


def is_plain(value: Any) -> bool:
    """Whether a value is made of nothing but numbers, strings, lists and dicts."""
    if isinstance(value, Mapping):
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)
