"""One datamodule for every stage: the stage says what it reads (`batch_format`), this file brings it."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import BatchFormat
from rlhf_lightning.data.building import Encoding, TrainOn
from rlhf_lightning.data.encode import Encoded
from rlhf_lightning.data.items import Collator, Item, with_reference
from rlhf_lightning.data.loader import EpochSampler, Plan, ResumableLoader
from rlhf_lightning.data.options import contradictions, inert_options
from rlhf_lightning.data.report import DataReport, write_reports
from rlhf_lightning.data.splits import (
    Holdout,
    SourceRows,
    Sources,
    Split,
    as_sources,
    read_rows,
    read_split,
    warn_of_overlap,
)
from rlhf_lightning.data.tokenizers import find_tokenizer, padding_id, usable_length, vocabulary_digest
from rlhf_lightning.data.truncation import LengthRule, Overlong


class RLHFDataModule(L.LightningDataModule):
    """Records for any stage: conversations, preferences, rankings, ratings, labels, steps or prompts.

    Args:
        train: one source or several: a path (.jsonl, .json, .parquet, .csv, a directory), a hub id, or
            {path, format, split, name, columns, weight, limit}.
        val: the same for validation.
        test: the same for testing.
        val_frac: instead of `val`: the share of the training records held out, chosen by each record's hash.
        pretraining: a second source, trained on beside the rollouts (PPO-ptx, GKD).
        pretraining_batch_size: records per batch of it; None: batch_size.
        tokenizer: folder or hub id; None: the model's.
        batch_size: records per device and batch; rows, if packed.
        eval_batch_size: the same for validation and testing; None: batch_size.
        tokens_per_batch: instead of batch_size: group records of like length into batches of at most so many tokens,
            padding included.
        max_length: tokens of a record; None: 1024, or what the tokenizer allows if that is less.
        max_prompt_length: tokens of a prompt; None: no limit of its own.
        overlong: longer records are cut (truncate), left out (drop), an error, or cut into pieces (split, texts only).
            All are counted in the data report.
        cut_first: where cutting begins: at the beginning of the prompt, then at the end of the completion (prompt), or
            only at the end (completion).
        packing: several records per row, kept apart by segments and positions (best-fit decreasing).
        train_on: in records with a prompt or several turns: every answer, the last answer, or all tokens.
        add_eos: whether an answer or text ends in the tokenizer's EOS (a chat template ends turns in its own way).
        parse_special_tokens: whether control tokens spelt out in plain strings are control tokens; else they are text.
        step_separator: written behind each step of stepwise records.
        on_bad_record: a record that cannot be used is an error, or it is left out and counted (skip).
        padding_side: of rows that are not prompts (these are always padded on the left).
        pad_to_multiple_of: rows' lengths are rounded up to a multiple of this.
        shuffle: whether each epoch has its own order.
        drop_last: whether a last batch that is not full is left out.
        num_workers: processes that collate.
        pin_memory: whether batches are put into page-locked memory.
        seed: of the order and of the part drawn from weighted sources.
    """

    def __init__(
        self,
        train: Sources | None = None,
        val: Sources | None = None,
        test: Sources | None = None,
        val_frac: float = 0.0,
        pretraining: Sources | None = None,
        pretraining_batch_size: int | None = None,
        tokenizer: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        overlong: Overlong = "truncate",
        cut_first: Literal["prompt", "completion"] = "prompt",
        packing: bool = False,
        train_on: TrainOn = "answers",
        add_eos: bool = True,
        parse_special_tokens: bool = False,
        step_separator: str = "\n",
        on_bad_record: Literal["error", "skip"] = "error",
        padding_side: Literal["left", "right"] = "right",
        pad_to_multiple_of: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        contradictions(self.options)
        for name in ("train", "val", "test", "pretraining"):
            for source in [] if self.options[name] is None else as_sources(self.options[name]):
                source.check()
        self.seed = seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._batch_format: BatchFormat | None = None
        self._splits: dict[str, Split] = {}
        self._loader: ResumableLoader | None = None
        self._resume_from: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Read, check and encode what a stage needs (called by the trainer, on every rank)."""
        module: Any = self.trainer.lightning_module
        tokenizer = None if self.options["tokenizer"] else module.tokenizer
        self.setup_for(module.batch_format, tokenizer, stage=stage)
        if stage == "fit" and self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            write_reports([split.report for split in self._splits.values()], Path(self.trainer.default_root_dir))

    def setup_for(
        self,
        batch_format: BatchFormat,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        *,
        stage: str = "fit",
    ) -> "RLHFDataModule":
        """The same without a trainer: `RLHFDataModule(...).setup_for("tokens", tokenizer).train_dataloader()`.

        Args:
            batch_format: what to make of the records.
            tokenizer: a tokenizer or where it is; None: the `tokenizer` given to the datamodule.
            stage: fit, validate, test or predict.
        """
        self._tokenizer = find_tokenizer(tokenizer or self.options["tokenizer"])
        if batch_format != self._batch_format:
            self._splits.clear()
        self._batch_format = batch_format
        if self.options["overlong"] == "split" and batch_format != "tokens":
            raise UserError(f"overlong: split cuts texts into pieces; this stage reads {batch_format}: use truncate")
        if stage == "fit":
            self._require("train")
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test", "val")}[stage]
        for name in wanted:
            if name not in self._splits and (self.options[name] is not None or (name == "val" and self.val_frac)):
                self._splits[name] = self._read(name, batch_format)
                if name != "train" and "train" in self._splits:
                    warn_of_overlap(self._splits["train"], self._splits[name])
        if stage == "validate" and "val" not in self._splits:
            raise UserError("there are no val records: set data.val or data.val_frac")
        if stage == "fit" and self.options["pretraining"] is not None and "pretraining" not in self._splits:
            self._splits["pretraining"] = self._read("pretraining", "tokens")
        return self

    @property
    def val_frac(self) -> float:
        return self.options["val_frac"]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in use."""
        if self._tokenizer is None:
            raise UserError("the datamodule is not set up: call setup_for(batch_format, tokenizer) or give a trainer")
        return self._tokenizer

    def encoding_for(
        self, batch_format: BatchFormat, tokenizer: PreTrainedTokenizerBase | str | None = None
    ) -> Encoding:
        """How records are read, as the options say.

        Args:
            batch_format: what to make of them.
            tokenizer: a tokenizer or where it is; None: the one in use, else the `tokenizer` option.
        """
        if tokenizer is not None or self._tokenizer is None:
            self._tokenizer = find_tokenizer(tokenizer or self.options["tokenizer"])
        options = self.options
        rule = LengthRule(
            usable_length(self.tokenizer, options["max_length"]),
            options["max_prompt_length"],
            options["overlong"],
            options["cut_first"],
        )
        return Encoding(
            self.tokenizer,
            batch_format,
            rule,
            options["train_on"],
            options["add_eos"],
            options["parse_special_tokens"],
            options["step_separator"],
            options["on_bad_record"] == "skip",
        )

    def read_rows(self, name: str) -> Iterator[SourceRows]:
        """The records of a data set as they stand in its sources."""
        given, holdout = self._given(name)
        return read_rows(given, holdout, skip_bad=self.options["on_bad_record"] == "skip")

    def _read(self, name: str, batch_format: BatchFormat) -> Split:
        given, holdout = self._given(name)
        weighted = name in ("train", "pretraining")
        return read_split(name, given, self.encoding_for(batch_format), holdout=holdout, weighted=weighted)

    def _given(self, name: str) -> tuple[Sources, Holdout | None]:
        from_train = name == "val" and self.options["val"] is None
        if self.val_frac and (from_train or name == "train"):
            return self.options["train"], Holdout(self.val_frac, is_held_out=from_train)
        return self.options[name], None

    def _require(self, name: str) -> None:
        if self.options[name] is None:
            raise UserError(
                f"data.{name} is not set: give a file, a folder or a hub id, e.g. --data.{name} {name}.jsonl"
            )

    def train_dataloader(self) -> Any:
        """Batches of the training records; an on-policy stage wraps the prompts' loader in its rollout loader."""
        loader = self._make_loader("train")
        self._loader = loader
        if self.trainer is None:
            return loader
        module: Any = self.trainer.lightning_module
        wrapped = module.wrap_train_dataloader(loader)
        if wrapped is not loader:  # it keeps its own state, and that of the loader within
            self._loader = None
        elif self._resume_from is not None:
            loader.load_state_dict(self._resume_from)
        self._resume_from = None
        return wrapped if wrapped is not loader else self._flat(loader)

    def val_dataloader(self) -> Any:
        """Batches of the validation records; no loader if there are none."""
        if "val" in self._splits:
            return self._flat(self._make_loader("val"))
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # it was the intention
        return []

    def test_dataloader(self) -> ResumableLoader:
        """Batches of the test records."""
        self._require("test")
        return self._make_loader("test")

    def predict_dataloader(self) -> Any:
        """Batches of the test records, else of those of validation."""
        return _Plain(self._make_loader("test" if "test" in self._splits else "val"))

    def pretraining_dataloader(self) -> ResumableLoader:
        """Batches of the second source, as `TokenBatch`."""
        self._require("pretraining")
        return self._make_loader("pretraining")

    # ---- what a reference model said of the records -----------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The data sets that are read."""
        return list(self._splits)

    def items(self, name: str) -> Sequence[Item]:
        """The encoded records of a data set."""
        return self._splits[name].items

    def rows(self, name: str) -> list[Encoded]:
        """Every token row of a data set: item after item, the rows of a pair one after the other."""
        return [row for item in self.items(name) for row in item.rows()]

    def attach_reference(self, name: str, ref_logprobs: Sequence[np.ndarray]) -> None:
        """Let every batch of a data set carry what the reference said of its tokens.

        Args:
            name: of the data set.
            ref_logprobs: one array per row, in the order of `rows(name)`.
        """
        rest = iter(ref_logprobs)
        items = [with_reference(item, [next(rest) for _ in item.rows()]) for item in self.items(name)]
        self._splits[name] = replace(self._splits[name], items=items)

    def origin(self, name: str) -> dict[str, str]:
        """What decides the tokens of a data set, in words: its sources, the tokenizer and the options of encoding."""
        given, _ = self._given(name)
        rule = self.encoding_for(self._batch_format or "tokens").rule
        options = ("train_on", "add_eos", "parse_special_tokens", "step_separator", "on_bad_record", "val_frac")
        template = self.tokenizer.chat_template
        return {
            "batch_format": str(self._batch_format),
            "sources": "; ".join(map(str, as_sources(given))),
            "tokenizer": f"{len(self.tokenizer)} tokens, {vocabulary_digest(self.tokenizer)}",
            "chat_template": template if isinstance(template, str) else str(template),
            **{field.name: str(getattr(rule, field.name)) for field in fields(rule)},
            **{option: str(self.options[option]) for option in options},
        }

    def report(self, name: str = "train") -> DataReport:
        """What became of a data set's records."""
        return self._splits[name].report

    def _flat(self, loader: ResumableLoader) -> Any:
        """The loader; where Lightning would rebuild it with a sampler of its own, a plain iterable."""
        return _Plain(loader) if self.trainer is not None and self.trainer.overfit_batches > 0 else loader

    def _make_loader(self, name: str) -> ResumableLoader:
        if name not in self._splits:
            raise UserError(f"there are no {name} records: set data.{name}" + " or val_frac" * (name == "val"))
        split, options = self._splits[name], self.options
        batch_format = "tokens" if name == "pretraining" else self._batch_format
        assert batch_format is not None
        training = name in ("train", "pretraining")
        packing = options["packing"] and batch_format == "tokens"
        sizes = {"train": None, "pretraining": options["pretraining_batch_size"]}
        plan = Plan(
            counts=split.counts,
            weights=split.weights,
            batch_size=sizes.get(name, options["eval_batch_size"]) or options["batch_size"],
            widths=tuple(max(len(row.ids) for row in item.rows()) for item in split.items),
            rows=tuple(len(item.rows()) for item in split.items),
            pack_length=self.encoding_for(batch_format).rule.max_length if packing else None,
            tokens_per_batch=options["tokens_per_batch"] if name != "pretraining" else None,
            shuffle=options["shuffle"] and training and not (self.trainer and self.trainer.overfit_batches),
            seed=self.seed,
            drop_last=options["drop_last"] and training,
        )
        _check_budget(plan, name)
        collate = Collator(
            batch_format, padding_id(self.tokenizer), options["padding_side"], packing, options["pad_to_multiple_of"]
        )
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        loader = ResumableLoader(
            split.items,
            EpochSampler(plan, **ranks),
            collate,
            num_workers=options["num_workers"],
            pin_memory=options["pin_memory"],
        )
        if len(loader) == 0:
            raise UserError(f"{name}: {len(split.items)} records fill no batch of {plan.batch_size} (drop_last: true)")
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where the training loader stands.

        Lightning keeps it too, but loses it when the optimiser's schedule asks for the number of steps, and with it
        for the loader, before the checkpoint is read.
        """
        return {} if self._loader is None else {"train_loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_from = state_dict.get("train_loader")

    def inert_options(self, batch_format: BatchFormat | None = None) -> Iterable[tuple[str, str]]:
        """(key, reason) of each option that is set and does nothing, given what the stage reads."""
        return inert_options(self.options, batch_format or self._batch_format)


class _Plain:
    """A sized iterable and nothing else: Lightning leaves it as it is."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def _check_budget(plan: Plan, name: str) -> None:
    if plan.tokens_per_batch is None:
        return
    largest = max(width * rows for width, rows in zip(plan.widths, plan.rows, strict=True))
    if largest > plan.tokens_per_batch:
        raise UserError(
            f"tokens_per_batch={plan.tokens_per_batch} cannot hold the largest record of {name} ({largest} tokens); "
            "raise it or lower max_length"
        )
