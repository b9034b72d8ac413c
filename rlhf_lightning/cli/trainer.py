"""A Trainer with four more things to do: answer prompts, plan memory, show records, export."""

import inspect
from json import dumps
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_lightning.callbacks.answering import answer_prompts, prompt_batches
from rlhf_lightning.callbacks.atomic_checkpoint import read_checkpoint
from rlhf_lightning.cli.planned import memory_at_hand
from rlhf_lightning.cli.run_folder import check_writable, checked, misfit
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.preview import preview_records
from rlhf_lightning.data.readers import Source, read_source
from rlhf_lightning.planning.phases import Run
from rlhf_lightning.planning.plan import bytes_of, make_plan
from rlhf_lightning.planning.report import does_not_fit, report
from rlhf_lightning.rollout.spec import GenerationSpec

# `typing` gives Lightning's Optional[Union[int, float]] the order of whoever wrote such a type first, in any package.
# By the other order 1 batch is read as 1.0, which is all of them; `int | float` keeps its own
for _option in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
    inspect.unwrap(Trainer.__init__).__annotations__[_option] = int | float | None


class RLHFTrainer(Trainer):
    """Lightning's Trainer; `generate`, `plan`, `preview` and `export` are subcommands as `fit` is."""

    def generate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        prompt: list[str] | str | None = None,
        prompts: str | None = None,
        out: str | None = None,
        sampling: GenerationSpec | None = None,
        batch_size: int = 16,
        ckpt_path: str | None = "auto",
    ) -> list[dict[str, Any]]:
        """Answer prompts with the policy of a config.

        Args:
            model: a stage that trains a policy.
            datamodule: not read.
            prompt: prompts given on the command line: --prompt "Once upon" or --prompt '[one, two]'.
            prompts: a file of prompts: .jsonl, .json, .parquet or .csv with a `prompt` column, or one prompt a line.
            out: also write prompts and answers to this .jsonl file.
            sampling: how to sample; default: the stage's own generation options.
            batch_size: prompts answered at once.
            ckpt_path: weights: a checkpoint, `last` of the run folder, `auto` (last if there is one, else the model
                that the config starts from), or null (the model that the config starts from).
        """
        _at_least_1("batch_size", batch_size)
        questions = _read_prompts(prompt, prompts)
        if out is not None:
            if Path(out).is_dir():
                raise UserError(f"--out {out} is a folder: name a .jsonl file")
            check_writable(Path(out).parent, "--out")
        self._build(model, ckpt_path)
        if getattr(model, "policy", None) is None:
            raise UserError(f"{type(model).__name__} has no policy that could answer; generate takes SFT, PPO and such")
        spec = sampling or getattr(model, "generation", None) or GenerationSpec()
        rows: list[dict[str, Any]] = []
        for index, batch in enumerate(prompt_batches(model.tokenizer, questions, batch_size)):
            samples = answer_prompts(model, batch, spec, purpose="generate", index=index)
            rows += [{"prompt": s.prompt, "completion": s.completion, "finished": s.finished} for s in samples]
        _show_answers(rows)
        if out is not None:
            Path(out).write_text("".join(dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            print(f"written to {out}")
        return rows

    def preview(
        self,
        model: LightningModule,
        datamodule: RLHFDataModule,
        num_records: int = 4,
        split: Literal["train", "val", "test", "pretraining"] = "train",
    ) -> None:
        """Print a few records as the stage will see them, every token coloured by what it counts for.

        Args:
            model: the stage: its tokenizer and the kind of records it wants.
            datamodule: the records.
            num_records: how many.
            split: which of the data sets.
        """
        _at_least_1("num_records", num_records)
        tokenizer = None if datamodule.options["tokenizer"] else model.tokenizer
        Console(width=None if Console().is_terminal else 120).print(
            preview_records(datamodule, model.batch_format, num_records, tokenizer=tokenizer, split=split)
        )

    def plan(
        self,
        model: LightningModule,
        datamodule: RLHFDataModule,
        memory: str | None = None,
        length: int | None = None,
        json: str | None = None,
        run: Run | None = None,
    ) -> None:
        """Predict the peak memory of every phase of a run, without its weights, and say what fits and what to set.

        Args:
            model: the stage.
            datamodule: its records, which say how long rows are.
            memory: of the card: 80GB, 24GiB; default: of the one at hand, without one of this machine.
            length: tokens of a row, prompt and answer together; default: the longest of the data, which need not be
                there if this is given.
            json: also write everything to this file.
            run: what of the trainer's options decides about memory.
        """
        if json is not None:
            check_writable(Path(json).parent, "--json")
        size = memory_at_hand() if memory is None else bytes_of(memory)
        plan = make_plan(model, datamodule, run or Run(), size, length)
        print(report(plan))
        if json is not None:
            Path(json).write_text(dumps(plan.as_dict(), indent=1) + "\n", encoding="utf-8")
        if plan.proposal is None:
            raise UserError(does_not_fit(plan))

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        folder: str | None = None,
        ckpt_path: str | None = "last",
    ) -> Path:
        """Write a checkpoint as a Hugging Face folder.

        Args:
            model: the stage that wrote the checkpoint.
            datamodule: not read.
            folder: where to write; default: `hf` in the run folder.
            ckpt_path: a checkpoint, `last` of the run folder, or null (the model that the config starts from).
        """
        target = Path(folder) if folder else Path(self.default_root_dir) / "hf"
        check_writable(target.parent, "--folder")
        self._build(model, ckpt_path)
        path = Path(model.export(target))
        print(f"exported to {path}")
        return path

    def _build(self, model: LightningModule, ckpt_path: str | None) -> None:
        """Networks with their weights, on the device, ready to be asked."""
        model.trainer = self
        self.strategy._lightning_module = model
        model.configure_model()
        if ckpt_path is not None:
            load_weights(model, ckpt_path)
        model.to(self.strategy.root_device).eval()


def load_weights(model: LightningModule, ckpt_path: str | Path) -> None:
    """The weights of a checkpoint, and nothing else of it: the config says everything else."""
    path = Path(checked(ckpt_path))
    if path.is_dir():
        raise UserError(f"{path} is a sharded checkpoint; give one that is a single file")
    checkpoint = read_checkpoint(path)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise misfit(path, error) from error
    print(f"weights: {path}, step {checkpoint.get('global_step', '?')}")


def _at_least_1(option: str, value: int) -> None:
    if value < 1:
        raise UserError(f"--{option} {value}: give at least 1")


def _read_prompts(given: list[str] | str | None, file: str | None) -> list[Any]:
    questions: list[Any] = [given] if isinstance(given, str) else list(given or [])
    if file is not None:
        path = Path(file)
        if path.suffix in (".jsonl", ".json", ".parquet", ".csv"):
            table = read_source(Source(path=file))
            if "prompt" not in table.columns():
                raise UserError(f"{file} has no column `prompt`; its columns are {', '.join(table.columns())}")
            questions += [row["prompt"] for row in table.rows]
        elif path.is_file():
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"--prompts {file}: not UTF-8 text (byte {error.start})") from error
            questions += [line for line in text.splitlines() if line.strip()]
        else:
            raise UserError(f"--prompts {file}: no such file")
    if not questions:
        raise UserError('nothing to answer: give --prompt "some text" or --prompts FILE')
    return questions


def _show_answers(rows: list[dict[str, Any]]) -> None:
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print(f"> {row['prompt']}\n{row['completion']}\n")
        return
    table = Table("prompt", "answer", show_lines=True)
    for row in rows:
        table.add_row(Text(row["prompt"]), Text(row["completion"]))
    console.print(table)
