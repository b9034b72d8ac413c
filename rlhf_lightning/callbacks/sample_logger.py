"""Answers to the same prompts before and after, as a table in the terminal; these and all rollouts in samples.jsonl."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_lightning.callbacks.answering import answer_prompts
from rlhf_lightning.core.batches import Generated, Rollouts, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.failpoints import failpoint
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.models.sharded import is_sharded
from rlhf_lightning.rewards.combine import ScoredSamples
from rlhf_lightning.rollout.spec import GenerationSpec

TEXT_PROMPT_LENGTH = 8
"""Tokens of a record without a prompt (plain text) that serve as one."""


@dataclass(frozen=True)
class SampleRow:
    """One line of samples.jsonl."""

    step: int
    """Optimiser steps done when `after` was said."""
    prompt: str
    before: str
    """What the model answered before the first step."""
    after: str
    score_before: float | None = None
    """By the stage's reward functions; None for a stage without any."""
    score_after: float | None = None
    breakdown_before: dict[str, float] | None = None
    """Each reward function's score and what is behind it (`function/part`), before weighting."""
    breakdown_after: dict[str, float] | None = None


@dataclass(frozen=True)
class CompletionRow:
    """One line of samples.jsonl: an answer that was trained on, or dropped."""

    step: int
    """Optimiser steps done when it was sampled."""
    rollout: int
    """Number of the rollout, from 0."""
    prompt: str
    completion: str
    finished: bool
    valid: bool
    """False: a reward function could not score it, and it carried no loss."""
    score: float | None
    """Weighted sum of the reward functions, before shaping; None of a stage without any."""
    breakdown: dict[str, float]
    """Each reward function's score and what is behind it (`function/part`), before weighting."""


class SampleLogger(Callback):
    """Asks the same few prompts before training and again at its end, and shows the answers side by side.

    An on-policy stage is asked the prompts of its first rollout, any other stage with a policy those of its first
    batch; a stage without a policy (a reward model) is asked nothing. Rows are appended to `samples.jsonl` in the run
    folder and, where the logger can, logged as a table or text. Of an on-policy stage, every answer of every rollout is
    appended there too, with the score of each reward function: what a policy was rewarded for can be read.

    Args:
        num_prompts: how many.
        every_n_steps: ask again every so many optimiser steps, besides the end.
        max_new_tokens: length of an answer of a stage that has no generation options of its own.
        file: name of the file in the run folder.
        show: print the table in the terminal.
        rollouts: append every answer of every rollout (of the first rank; some hundred bytes each).
    """

    def __init__(
        self,
        num_prompts: int = 4,
        every_n_steps: int | None = None,
        max_new_tokens: int = 48,
        file: str = "samples.jsonl",
        show: bool = True,
        rollouts: bool = True,
    ) -> None:
        if num_prompts < 1:
            raise UserError(f"SampleLogger: num_prompts={num_prompts} shows nothing; use at least 1")
        self.num_prompts = num_prompts
        self.every_n_steps = every_n_steps
        self.max_new_tokens = max_new_tokens
        self.file = file
        self.show = show
        self.rollouts = rollouts
        self._prompt_ids: list[list[int]] = []
        self._records: list[dict[str, Any]] = []
        """Of the prompts: a verifier finds its key there."""
        self._num_rollouts = 0
        self._before: list[SampleRow] = []
        self._asked_at = -1
        self._is_resumed = False

    # --- what is asked, and the first answers

    def on_rollout_scored(
        self, trainer: Trainer, module: LightningModule, answers: Generated, scored: ScoredSamples
    ) -> None:
        if self.rollouts:
            self._append(trainer, list(_completion_rows(scored, trainer.global_step, self._num_rollouts)))
        if not self._before and trainer.global_step == 0:
            self._choose(module, answers, scored)

    def on_rollout_end(self, trainer: Trainer, module: LightningModule, rollouts: Rollouts) -> None:
        self._num_rollouts += 1

    def _choose(self, module: LightningModule, answers: Generated, scored: ScoredSamples) -> None:
        """Remember the first answers to some prompts."""
        chosen: dict[tuple[int, ...], int] = {}
        for row in range(answers.tokens.shape[0]):
            if not scored.counts[row] or not answers.mask[row].any():
                continue  # dropped, or nothing was said
            first = int(answers.mask[row].int().argmax())
            ids = answers.tokens[row, :first][answers.attention_mask[row, :first]].tolist()
            chosen.setdefault(tuple(ids), row)
            if len(chosen) == self.num_prompts:
                break
        rows = list(chosen.values())
        said = [answers.tokens[row][answers.mask[row]].tolist() for row in rows]
        known = list(_with_breakdown(scored))
        self._records = [dict(known[row][0].record) for row in rows]
        totals = _totals(scored)
        scores, breakdowns = [totals[row] for row in rows], [known[row][1] or None for row in rows]
        self._remember(module, [list(ids) for ids in chosen], said, scores, breakdowns)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        is_first = not self._before and trainer.global_step == 0 and isinstance(batch, TokenBatch)
        if not is_first or getattr(module, "policy", None) is None:
            return
        ids = [_prompt_of(batch, row) for row in range(min(self.num_prompts, batch.tokens.shape[0]))]
        self._prompt_ids = [row for row in ids if row]
        if trainer.strategy.reduce_boolean_decision(bool(self._prompt_ids)):  # sharded weights answer together
            self._records = [{} for _ in self._prompt_ids]
            samples, scores, breakdowns = self._ask(trainer, module)
            answers = [list(sample.tokens) for sample in samples]
            self._remember(module, self._prompt_ids, answers, scores, breakdowns)

    def _remember(
        self,
        module: LightningModule,
        prompts: list[list[int]],
        answers: list[list[int]],
        scores: list[Any],
        breakdowns: list[Any],
    ) -> None:
        tokenizer = module.tokenizer
        self._prompt_ids = prompts
        asked = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        said = tokenizer.batch_decode(answers, skip_special_tokens=True)
        self._before = [
            SampleRow(0, prompt, before, before, score, score, breakdown, breakdown)
            for prompt, before, score, breakdown in zip(asked, said, scores, breakdowns, strict=True)
        ]

    # --- the later answers

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and step > 0 and step % self.every_n_steps == 0 and step != self._asked_at:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._asked_at:
            self._write(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0 and trainer.is_global_zero:  # resumed: later rows will come again
            keep_rows(self._path(trainer), lambda row: self._stays(row, trainer.global_step))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a run resumed at its very end trains no more, and may still owe its last answers. Sharded weights cannot be
        # asked any longer
        if trainer.global_step != self._asked_at and not is_sharded(pl_module):
            self._write(trainer, pl_module)

    def _stays(self, row: dict[str, Any], step: int) -> bool:
        """Whether a resumed run will not come to this row again."""
        return row["rollout"] < self._num_rollouts if "rollout" in row else row["step"] <= step

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        # on every rank or none: sharded weights answer together
        if not trainer.strategy.reduce_boolean_decision(bool(self._before)):
            return
        samples, scores, breakdowns = self._ask(trainer, module)
        self._asked_at = trainer.global_step
        if not trainer.is_global_zero:
            return
        rows = [
            replace(
                row, step=trainer.global_step, after=sample.completion, score_after=score, breakdown_after=breakdown
            )
            for row, sample, score, breakdown in zip(self._before, samples, scores, breakdowns, strict=True)
        ]
        if self._is_resumed:  # killed between these rows and its end, the run writes them again
            keep_rows(self._path(trainer), lambda row: "rollout" in row or row["step"] != trainer.global_step)
            self._is_resumed = False
        self._append(trainer, rows)
        if self.show:
            show_rows(rows)
        _to_loggers(trainer, rows)

    def _append(self, trainer: Trainer, rows: Sequence[SampleRow | CompletionRow]) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        failpoint("samples.before_write")
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)
        failpoint("samples.after_write")

    def _ask(self, trainer: Trainer, module: LightningModule) -> tuple[list[Sample], list[Any], list[Any]]:
        """Answers, their scores and breakdowns (None where there are none)."""
        spec = getattr(module, "generation", None) or GenerationSpec(max_new_tokens=self.max_new_tokens)
        ids, tokenizer = self._prompt_ids, module.tokenizer
        batch = collate_prompts(
            ids, tokenizer.batch_decode(ids), self._records, range(len(ids)), tokenizer.pad_token_id
        )
        with trainer.precision_plugin.forward_context():
            samples = answer_prompts(module, batch, replace(spec, num_samples=1), purpose="samples")
            return samples, *_scores(module, samples)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.file

    # --- a resumed run still knows what was said at the start

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompt_ids": self._prompt_ids,
            "records": json.dumps(self._records, default=str),  # a checkpoint holds plain types only
            "before": [asdict(row) for row in self._before],
            "num_rollouts": self._num_rollouts,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._prompt_ids = state_dict["prompt_ids"]
        self._records = json.loads(state_dict["records"])
        self._before = [SampleRow(**row) for row in state_dict["before"]]
        self._num_rollouts = state_dict["num_rollouts"]
        self._is_resumed = True


def keep_rows(path: Path, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Takes rows out of a JSONL file, and half a row that a killed process left; whole or not at all."""
    if not path.exists():
        return
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
    kept = b"".join(line for line in lines if stays(json.loads(line)))
    if kept != text:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(kept)
        partial.replace(path)


def _prompt_of(batch: TokenBatch, row: int) -> list[int]:
    """What stands before the first trained token of a row's first record; of plain text the first few tokens."""
    tokens, real, mask = batch.tokens[row], batch.attention_mask[row], batch.mask[row]
    if batch.segments is not None:
        real = real & (batch.segments[row] == 1)
    ids, counts = tokens[real].tolist(), mask[real].tolist()
    length = counts.index(True) if True in counts else len(counts)
    return ids[:length] if length > 1 else ids[:TEXT_PROMPT_LENGTH]


def _scores(module: LightningModule, samples: list[Sample]) -> tuple[list[Any], list[Any]]:
    """Scores and breakdowns by the stage's reward functions, if it has any that can do with what is known."""
    nothing = [None] * len(samples)
    score = getattr(module, "score_samples", None)
    if score is None:
        return nothing, nothing
    try:
        scored: ScoredSamples = score(samples)
    except (UserError, KeyError):
        return nothing, nothing
    return _totals(scored), [breakdown or None for _, breakdown in _with_breakdown(scored)]


def _with_breakdown(scored: ScoredSamples) -> Iterator[tuple[Sample, dict[str, float]]]:
    """Each sample with its score from each function, and with what is behind that."""
    columns = {name: values.tolist() for name, values in (scored.breakdown | scored.parts).items()}
    for row, sample in enumerate(scored.samples):
        yield sample, {name: values[row] for name, values in columns.items()}


def _totals(scored: ScoredSamples) -> list[float] | list[None]:
    """Of each sample; None where there is no reward function."""
    return scored.total.tolist() if scored.breakdown else [None] * len(scored.total)


def _completion_rows(scored: ScoredSamples, step: int, rollout: int) -> Iterator[CompletionRow]:
    totals, valid = _totals(scored), scored.counts.tolist()
    for row, (sample, breakdown) in enumerate(_with_breakdown(scored)):
        yield CompletionRow(
            step=step,
            rollout=rollout,
            prompt=sample.prompt,
            completion=sample.completion,
            finished=sample.finished,
            valid=valid[row],
            score=totals[row],
            breakdown=breakdown,
        )


def show_rows(rows: Sequence[SampleRow]) -> None:
    """The table in the terminal; plain paragraphs where there is none."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print(f"prompt: {row.prompt}\n  before{_score(row.score_before, ' ({})')}: {row.before}")
            print(f"  after{_score(row.score_after, ' ({})')}: {row.after}", flush=True)
        return
    table = Table("prompt", "before", "after", "score", title=f"step {rows[0].step}", show_lines=True)
    for row in rows:
        change = f"{_score(row.score_before)} → {_score(row.score_after)}" if row.score_after is not None else ""
        table.add_row(Text(row.prompt), Text(row.before), Text(row.after), change)
    console.print(table)


def _score(value: float | None, shape: str = "{}") -> str:
    return "" if value is None else shape.format(f"{value:.3g}")


def _to_loggers(trainer: Trainer, rows: Sequence[SampleRow]) -> None:
    step = trainer.global_step
    columns = [field.name for field in fields(SampleRow) if "breakdown" not in field.name]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(
                "samples",
                columns=columns,
                data=[[getattr(row, column) for column in columns] for row in rows],
                step=step,
            )
        elif isinstance(logger, MLFlowLogger):
            table = {column: [getattr(row, column) for row in rows] for column in columns}
            logger.experiment.log_table(logger.run_id, table, artifact_file="samples.json")
        elif isinstance(logger, TensorBoardLogger):
            text = "\n\n".join(f"**{row.prompt}**\n\n{row.before}\n\n→ {row.after}" for row in rows)
            logger.experiment.add_text("samples", text, step)
