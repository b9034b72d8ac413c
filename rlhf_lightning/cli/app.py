"""Lightning's command line with its traps closed: no abbreviations, options beat checkpoints, one run per folder."""

import logging
import pickle
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import CheckpointIO

from rlhf_lightning import __version__
from rlhf_lightning import callbacks as _callbacks  # noqa: F401  short class names resolve once imported
from rlhf_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO
from rlhf_lightning.cli.checks import at, check_config, check_instances, check_trainer_names
from rlhf_lightning.cli.defaults import DefaultCallback, default_callbacks, default_logger
from rlhf_lightning.cli.imports import only_from, split_allowed
from rlhf_lightning.cli.messages import explain, located
from rlhf_lightning.cli.planned import on_one_cpu, run_of
from rlhf_lightning.cli.ranks import watched
from rlhf_lightning.cli.run_folder import RunFolder, checked, misfit
from rlhf_lightning.cli.sources import ConfigSources
from rlhf_lightning.cli.trainer import RLHFTrainer
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.pipelines.rooms import import_rooms

METHOD_SKIPS = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
ALL_DEFAULT_CALLBACKS: list[str] = list(DefaultCallback.__args__)  # type: ignore[attr-defined]


class RLHFParser(LightningArgumentParser):
    """A parser that refuses abbreviated options and raises `UserError` where argparse would exit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if nested_key == "data":
            kwargs["sub_configs"] = False  # a data file is data: its content is not the value of data.train
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise UserError(message) from ex


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run folder when training starts; `fit --config` on it repeats the run."""

    NOT_OF_THE_RUN = ("config", "ckpt_path", "weights_only", "resume", "overwrite")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        kept = self.config.clone()
        for key in self.NOT_OF_THE_RUN:
            kept.pop(key, None)
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(kept, str(folder / self.config_filename), skip_none=False, overwrite=True, multifile=False)


def be_quiet() -> None:
    """Leaves out what Lightning says that no user of this command line can act on."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(kept, _Chatter) for kept in logger.filters):
        logger.addFilter(_Chatter())
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks.*")
    # the order is Lightning's own; a first step in which nothing counts is none for torch
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before `optimizer.step.*")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")  # no validation data
    warnings.filterwarnings("ignore", message="(?s).*deprecated in v4.*removed in v5.*")  # what Lightning calls


class _Chatter(logging.Filter):
    STARTS = ("💡 Tip", "TPU available", "GPU available: False", "Loading `train_dataloader` to estimate")

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.STARTS)


def family() -> tuple[type, type]:
    """The stages and the datamodule; importing them makes their short names known to the parser."""
    from rlhf_lightning.data.datamodule import RLHFDataModule
    from rlhf_lightning.stages.base import RLHFModule

    import_rooms("stages", "rewards", "losses", "advantages")
    return RLHFModule, RLHFDataModule


class ParsedOnly(Exception):
    """Ends a command line that was to be read and nothing more."""


def check_command_line(args: list[str]) -> int:
    """Reads a command line as `RLHFCLI` would, without building anything; raises `UserError` where it is wrong."""
    with suppress(ParsedOnly):
        RLHFCLI(args, parse_only=True)
    return 0


def _root_of(error: BaseException) -> BaseException:
    """What a constructor said, without the layers that jsonargparse puts around it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    for said in chain:
        if isinstance(said, UserError):
            return said
    return UserError(str(chain[-1])) if isinstance(chain[-1], ValueError) else chain[-1]


class RLHFCLI(LightningCLI):
    """Parses one command line, builds stage, data and trainer from it, and runs the subcommand.

    Args:
        args: subcommand and options, as in a shell; default: those of this process.
        parse_only: read and check the options, build nothing.
    """

    def __init__(self, args: list[str] | None = None, *, parse_only: bool = False) -> None:
        self.parse_only = parse_only
        be_quiet()
        self.args, named = split_allowed(sys.argv[1:] if args is None else args)
        with only_from(named):
            self._run()

    def _run(self) -> None:
        self.sources = ConfigSources.of_command_line(self.args[1:])
        self.run_folder: RunFolder | None = None
        model_class, datamodule_class = family()
        super().__init__(
            model_class=model_class,
            subclass_mode_model=True,
            datamodule_class=datamodule_class,
            trainer_class=RLHFTrainer,
            trainer_defaults={"default_root_dir": "runs/default", "log_every_n_steps": 1},
            save_config_callback=SaveRunConfig,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            parser_class=RLHFParser,
            parser_kwargs={"prog": "rlhf-lightning", "version": __version__},
            args=self.args,
        )

    # --- parsing

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        names = ("fit", "validate", "test", "predict", "generate", "plan", "preview", "export")
        return {name: METHOD_SKIPS | {"run"} for name in names}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # a parser costs a third of a second: only the one that is asked for is built
        wanted = self.args[0] if self.args else None
        every = self.subcommands()
        if wanted in every:
            self.subcommands = lambda: {wanted: every[wanted]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=str,
                default="never",
                help="never: a folder that holds a run is an error; auto: go on from its newest checkpoint "
                "that is whole, if there is one; or the path of a checkpoint.",
            )
            parser.add_argument(
                "--overwrite", type=bool, default=False, help="Delete the run that the folder holds and start anew."
            )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--default_callbacks",
            type=list[DefaultCallback],
            default=ALL_DEFAULT_CALLBACKS,
            help="Which of the built-in callbacks run. One of the same class under trainer.callbacks replaces it.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.sources.check()
        try:
            self.config = parser.parse_args(args, env=False)  # whatever JSONARGPARSE_DEFAULT_ENV says
        except UserError as error:
            raise UserError(explain(str(error), self.sources, self._subcommand_parsers[self.args[0]])) from error
        check_config(self.config[self.config.subcommand], self.sources)
        if self.parse_only:
            raise ParsedOnly

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's hyperparameters would silently beat the command line."""

    # --- building

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_trainer_names(config.trainer, self.sources)
        if self.subcommand == "plan":
            # no machine has to be there for its memory to be planned
            self.planned_run = run_of(config.trainer, memory_given=config.memory is not None)
            for option, value in on_one_cpu().items():
                config.trainer[option] = value
        self.run_folder = RunFolder(Path(config.trainer.default_root_dir))
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            config.ckpt_path = self.run_folder.prepare(config.resume, config.overwrite, config.get("ckpt_path"))
        elif config.get("ckpt_path") in ("last", "auto"):
            last = self.run_folder.last_checkpoint(required=config.ckpt_path == "last")
            config.ckpt_path = None if last is None else str(last)
        elif "://" not in (config.get("ckpt_path") or "://"):
            config.ckpt_path = checked(config.ckpt_path)
        if "weights_only" in config:
            if config.weights_only is False:
                place = at("weights_only", self.sources)
                raise UserError(f"{place}=false would run code from a checkpoint; leave it out")
            config.weights_only = True

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            said = _root_of(error)
            raise (located(said, self.sources) if isinstance(said, UserError) else said) from error
        check_instances(self.config[self.subcommand], self.model, self.datamodule, self.sources)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        assert self.run_folder is not None
        config = dict(config)
        given = config.get("callbacks") or []
        given = list(given) if isinstance(given, list) else [given]
        wanted = self._get(self.config_init, "default_callbacks")
        config["callbacks"] = given + default_callbacks(wanted, given, config, self.subcommand, self.run_folder.path)
        if config.get("barebones") and self.sources.where("trainer.log_every_n_steps") is None:
            config["log_every_n_steps"] = None  # our default, which barebones does not allow
        kept = any(isinstance(callback, Checkpoint) for callback in config["callbacks"])
        if not kept and config.get("enable_checkpointing") is None:
            config["enable_checkpointing"] = False  # else Lightning adds one of its own
        if config.get("logger") in (None, True) and not config.get("barebones"):
            config["logger"] = default_logger(self.run_folder.path) if self.subcommand == "fit" else False
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            raise UserError(f"trainer: {error}") from error
        watched(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
            raise misfit(self.config[subcommand].get("ckpt_path"), error) from error
        except MisconfigurationException as error:
            raise UserError(f"trainer: {error}") from error
        except pickle.UnpicklingError as error:
            path, why = self.config[subcommand].get("ckpt_path"), str(error).splitlines()[0]
            raise UserError(f"{path} holds more than weights and numbers and is not read: {why}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "plan":
            kwargs["run"] = self.planned_run
        if subcommand == "fit":
            kwargs["ckpt_path"] = self.config["fit"].ckpt_path
        return kwargs
