"""Checks of a config that no type can express, and of keys that would do nothing."""

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from rlhf_lightning.cli.sources import ConfigSources
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule

CASTING = ("16-true", "bf16-true", "64", "64-true", "transformer-engine", "transformer-engine-float16")
"""Precisions whose plugin converts every tensor of a batch."""
RANGES = (
    (r"seed_everything", 0, 2**32 - 1, "a seed is a whole number from 0 to 4294967295"),
    (r"model\..*optimizer\.(?:.*\.)?lr", 1e-300, 100, "a learning rate is positive, usually 1e-7 to 1e-1"),
    (r"model\..*optimizer\.(?:.*\.)?(?:weight_decay|eps)", 0, math.inf, "give 0 or more"),
    (r"model\..*optimizer\.(?:.*\.)?(?:betas|momentum)", 0, 1 - 1e-12, "give 0 or more, below 1"),
    (r"model\..*lora\.alpha", 1e-300, math.inf, "the scale of an adapter is positive"),
    (r"trainer\.limit_\w+_batches", 0, math.inf, "give a share from 0.0 to 1.0, or a number of batches"),
    (r"trainer\.log_every_n_steps", 0, math.inf, "give 0 (never) or more"),
    (r"trainer\.val_check_interval", 1e-300, math.inf, "give a positive share of an epoch, or a number of batches"),
)
"""Options of torch, peft and Lightning, which look at them late or never: key, least, most, what to give."""

Inert = tuple[str, str]
"""A dotted key and why it does nothing."""


def check_config(config: Any, sources: ConfigSources) -> None:
    """Refuses numbers that are none, and those that cannot be meant.

    Args:
        config: the parsed options of the subcommand.
        sources: where each was set.
    """
    for key, value in leaves(config.as_dict() if hasattr(config, "as_dict") else config):
        if not isinstance(value, float | int) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            raise UserError(f"{at(key, sources)}={value} is not a number that anything can be computed with")
        for pattern, least, most, remedy in RANGES:
            if re.fullmatch(pattern, key) and not least <= value <= most:
                raise UserError(f"{at(key, sources)}={value}: {remedy}")
        if re.fullmatch(r"trainer\.limit_\w+_batches", key) and isinstance(value, float) and value > 1:
            raise UserError(f"{at(key, sources)}={value}: give a share from 0.0 to 1.0, or a whole number of batches")


def check_trainer_names(trainer: Any, sources: ConfigSources) -> None:
    """Refuses what Lightning would answer with a traceback, or not at all: unknown names, numbers without a meaning."""
    names = {
        "strategy": {"auto", "ddp", "fsdp", *StrategyRegistry.available_strategies()},
        "accelerator": {"auto", "gpu", *AcceleratorRegistry.available_accelerators()},
    }
    for option, known in names.items():
        value = trainer.get(option)
        if isinstance(value, str) and value not in known:
            near = get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(known))}"
            raise UserError(f"{at(f'trainer.{option}', sources)}: there is no {option} {value!r}; {hint}")
    clip, accumulate = trainer.get("gradient_clip_val"), trainer.get("accumulate_grad_batches")
    if clip is not None and clip < 0:
        place = at("trainer.gradient_clip_val", sources)
        raise UserError(f"{place}={clip} clips nothing: give a positive number, or null")
    if accumulate is not None and accumulate < 1:
        raise UserError(f"{at('trainer.accumulate_grad_batches', sources)}={accumulate}: give at least 1")
    if (precision := str(trainer.get("precision"))) in CASTING:
        raise UserError(
            f"{at('trainer.precision', sources)}: {precision} would cast the numbers of a batch, whose sums need "
            "float32; use bf16-mixed, or half the weights by dtype: bfloat16 of the model"
        )


def check_instances(config: Any, model: Any, data: Any, sources: ConfigSources) -> None:
    """Refuses keys that the rest of the config leaves without effect."""
    found = [
        *inert_trainer_options(config, sources),
        *((f"model.init_args.{key}", why) for key, why in (*model.inert_options(), *_of_clipping(config, model))),
        *((f"data.{key}", why) for key, why in _of_data(data, model)),
    ]
    if found:
        raise UserError("\n  ".join(f"{at(key, sources)} does nothing: {why}; remove it" for key, why in found))


def _of_clipping(config: Any, model: Any) -> Iterable[Inert]:
    critic = getattr(model, "critic_spec", None)
    if critic is not None and critic.clip_apart and config["trainer"].get("gradient_clip_val") is None:
        yield "critic.clip_apart", "trainer.gradient_clip_val is not set, so nothing is clipped"


def _of_data(data: Any, model: Any) -> Iterable[Inert]:
    if isinstance(data, RLHFDataModule):
        yield from data.inert_options(model.batch_format)
        if data.options["pretraining"] is not None and not model.reads_pretraining:
            name = type(model).__name__
            why = f"{name} trains on no second source (with ptx_coef above 0, or on_policy_frac below 1, a stage does)"
            yield "pretraining", why
    elif hasattr(data, "inert_options"):
        yield from data.inert_options()


def inert_trainer_options(config: Any, sources: ConfigSources) -> Iterable[Inert]:
    """Trainer options that were set and have no effect beside the others."""

    def is_set(option: str) -> bool:
        # only what somebody wrote by hand, and not as it is anyway: a saved config names every key
        return sources.where(f"trainer.{option}") is not None and trainer.get(option) not in (None, False)

    trainer = config["trainer"]
    if is_set("gradient_clip_algorithm") and trainer.get("gradient_clip_val") is None:
        yield "trainer.gradient_clip_algorithm", "gradient_clip_val is not set, so nothing is clipped"
    data = config.get("data") or {}
    if not data.get("val") and not data.get("val_frac"):
        for option, default in (
            ("val_check_interval", 1.0),
            ("limit_val_batches", 1.0),
            ("check_val_every_n_epoch", 1),
        ):
            if is_set(option) and trainer.get(option) not in (0, default):
                yield f"trainer.{option}", "there is no validation data (data.val, data.val_frac)"
    if is_set("log_every_n_steps") and trainer.get("logger") is False:
        yield "trainer.log_every_n_steps", "logger is false, so nothing is logged"


def leaves(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """Every scalar below a mapping or list, with its dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner, key)
    else:
        yield key, value


def at(key: str, sources: ConfigSources) -> str:
    """The key, headed by the file and line that set it."""
    place = sources.where(key)
    return f"{place}: {place.key if place.file else '--' + place.key}" if place else key
