"""Options of the datamodule that contradict one another, and options that do nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import BatchFormat

DEFAULTS: dict[str, Any] = {
    "batch_size": 8,
    "pretraining_batch_size": None,
    "eval_batch_size": None,
    "tokens_per_batch": None,
    "max_prompt_length": None,
    "cut_first": "prompt",
    "packing": False,
    "train_on": "answers",
    "add_eos": True,
    "step_separator": "\n",
    "padding_side": "right",
    "pad_to_multiple_of": 1,
    "drop_last": False,
}
"""Of the options that may be inert; the same as in the datamodule's signature."""


def contradictions(options: Mapping[str, Any]) -> None:
    """Raise a UserError for options that exclude one another or are out of range."""
    for name in ("batch_size", "eval_batch_size", "pretraining_batch_size", "tokens_per_batch", "pad_to_multiple_of"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"{name}={options[name]} must be at least 1")
    for name in ("max_length", "max_prompt_length"):
        if options[name] is not None and options[name] < 2:
            raise UserError(
                f"{name}={options[name]} must be at least 2: the first token of a record is never predicted"
            )
    if not 0.0 <= options["val_frac"] < 1.0:
        raise UserError(f"val_frac={options['val_frac']} is a share of the records: at least 0, below 1")
    if options["num_workers"] < 0:
        raise UserError(f"num_workers={options['num_workers']} must be 0 (none) or more")
    if options["val"] is not None and options["val_frac"] > 0:
        raise UserError(f"val and val_frac={options['val_frac']} both say what is held out: give one of them")
    if options["val_frac"] > 0 and options["train"] is None:
        raise UserError(f"val_frac={options['val_frac']} holds out a share of train, which is not set")
    if options["packing"] and options["tokens_per_batch"] is not None:
        raise UserError(
            f"packing and tokens_per_batch={options['tokens_per_batch']} both say how rows are filled: with packing a "
            "batch has batch_size rows of max_length tokens"
        )
    if options["packing"] and options["padding_side"] == "left":
        raise UserError("packing fills rows from the left: padding_side: left contradicts it")
    limit, prompt_limit = options["max_length"], options["max_prompt_length"]
    if limit is not None and prompt_limit is not None and prompt_limit > limit:
        raise UserError(
            f"max_prompt_length={prompt_limit} is above max_length={limit}: the prompt is part of the record"
        )


def inert_options(options: Mapping[str, Any], batch_format: BatchFormat | None) -> Iterator[tuple[str, str]]:
    """(key, reason) of options that are set away from their default and do nothing.

    Args:
        options: all of them.
        batch_format: what the stage reads; None: not known, options that depend on it are taken as read.
    """
    reasons = {
        "batch_size": (options["tokens_per_batch"], "tokens_per_batch says how large a batch is"),
        "drop_last": (options["tokens_per_batch"], "batches of tokens_per_batch differ in size; none is short"),
        "pretraining_batch_size": (options["pretraining"] is None, "there is no pretraining source"),
        "eval_batch_size": (
            (options["val"] is None and not options["val_frac"] and options["test"] is None)
            or options["tokens_per_batch"],
            "there are no validation or test records, or tokens_per_batch says how large a batch is",
        ),
        "cut_first": (options["overlong"] != "truncate", f"overlong: {options['overlong']} cuts no prompt"),
    }
    if batch_format is not None:
        other = f"this stage reads {batch_format}"
        prompts = batch_format == "prompts"
        reasons |= {
            "packing": (batch_format != "tokens", f"{other}, which keep one record per row"),
            "train_on": (batch_format != "tokens", f"{other}, whose completions are scored as a whole"),
            "step_separator": (batch_format != "steps", other),
            "add_eos": (batch_format in ("prompts", "steps"), f"{other}, which get no EOS"),
            "padding_side": (prompts, f"{other}, which are always padded on the left"),
            "pad_to_multiple_of": (prompts, other),
        }
        if prompts and not reasons["cut_first"][0]:
            reasons["cut_first"] = (True, f"{other}, which have no completion")
    for key, (is_inert, reason) in reasons.items():
        if is_inert and options[key] != DEFAULTS[key]:
            yield key, reason
