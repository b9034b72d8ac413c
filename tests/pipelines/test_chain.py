"""Chains: two tiny trainings between two steps in Python, run, skipped, broken, resumed."""

import json
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import yaml

from rlhf_lightning.__main__ import main
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.pipelines.chain_spec import read_chain, strays, substitute
from rlhf_lightning.pipelines.fingerprint import existing_paths, fingerprint, fingerprint_path

STEPS = '''
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from rlhf_lightning import SFTModule


@dataclass(frozen=True)
class Make:
    out_dir: str
    num: int = 4

    def run(self):
        path = Path(self.out_dir) / "train.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = ["good", "bad", "long", "short", "great", "dull"][: self.num]
        path.write_text("".join(json.dumps({"prompt": "the film", "completion": f" was {w}"}) + "\\n" for w in words))
        return {"records": str(path), "num": self.num}


@dataclass(frozen=True)
class Report:
    run_dir: str
    score: float

    def run(self):
        page = Path(self.run_dir) / "report.html"
        page.write_text(f"score {self.score}")
        return {"report": str(page)}


class Breaks(SFTModule):
    """Stops in its second epoch, as long as the file `broken` lies about."""

    def on_train_epoch_start(self):
        with open("epochs.txt", "a") as file:
            file.write(f"{self.current_epoch} ")
        if self.current_epoch == 1 and Path("broken").exists():
            if Path("broken").read_text() == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
                return
            raise KeyboardInterrupt
'''


@pytest.fixture
def chain(tmp_path, tiny_tokenizer, tiny_config, monkeypatch) -> dict:
    """A chain of four stages in the working directory, a fresh folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf-lightning"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("steps.py").write_text(STEPS)
    sft = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_model_summary": False},
        "model": {
            "class_path": "steps.Breaks",
            "init_args": {"policy": {"config": tiny_config, "tokenizer": str(tiny_tokenizer)}},
        },
        "data": {"train": "elsewhere.jsonl", "batch_size": 2, "max_length": 16},
        "default_callbacks": ["checkpoint", "export"],
    }
    Path("sft.yaml").write_text(yaml.safe_dump(sft))
    more = json.loads(json.dumps(sft))
    more["model"]["init_args"]["policy"] = {"path": "elsewhere"}
    Path("more.yaml").write_text(yaml.safe_dump(more))
    yield {
        "run_dir": "runs/c",
        "variables": {"seed": 1, "num": 4},
        "stages": {
            "data": {"class_path": "steps.Make", "init_args": {"out_dir": "${folder}", "num": "${num}"}},
            "sft": {"config": "sft.yaml", "overrides": {"seed_everything": "${seed}", "data.train": "${data.records}"}},
            "more": {
                "config": "more.yaml",
                "overrides": {"model.policy.path": "${sft.hf}", "data.train": "${data.records}"},
            },
            "report": {"class_path": "steps.Report", "init_args": {"run_dir": "${run_dir}", "score": "${data.num}"}},
        },
    }
    sys.modules.pop("steps", None)


def run(chain: dict, *options: str) -> int:
    Path("chain.yaml").write_text(yaml.safe_dump(chain, sort_keys=False))
    return main(["chain", "--config", "chain.yaml", "--allow_module", "steps", *options])


def states(printed: str) -> list[str]:
    """State of each stage in the summary table."""
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    return [row[2].strip() for row in rows if row[1].strip() in ("data", "sft", "more", "report")]


def test_a_chain_runs_and_a_second_time_is_skipped(chain, capsys):
    assert run(chain) == 0
    assert states(capsys.readouterr().out) == ["ran"] * 4
    assert Path("runs/c/report.html").read_text() == "score 4.0"
    assert yaml.safe_load(Path("runs/c/more/config.yaml").read_text())["data"]["train"] == "runs/c/data/train.jsonl"
    assert run(chain) == 0
    assert states(capsys.readouterr().out) == ["skipped"] * 4


def test_what_changed_runs_again_and_what_follows_from_it(chain, capsys):
    assert run(chain) == 0
    assert run(chain, "--set", "more.trainer.max_epochs=1") == 0
    # the report reads the whole run folder
    assert states(capsys.readouterr().out)[4:] == ["skipped", "skipped", "ran", "ran"]
    assert run(chain, "--set", "num=3") == 0
    assert states(capsys.readouterr().out) == ["ran"] * 4


def test_a_terminated_stage_is_not_finished_and_goes_on(chain, capsys):
    Path("broken").write_text("SIGTERM")
    assert run(chain) == 143
    out = capsys.readouterr()
    assert "SIGTERM" in out.err
    assert not Path("runs/c/sft/finished.json").exists()
    Path("broken").unlink()
    assert run(chain) == 0
    assert states(capsys.readouterr().out) == ["skipped", "resumed", "ran", "ran"]


def test_a_damaged_output_is_made_again(chain, capsys):
    del chain["stages"]["more"]
    assert run(chain) == 0
    capsys.readouterr()
    Path("runs/c/sft/hf/model.safetensors").write_bytes(b"cut off")
    assert run(chain) == 0
    assert states(capsys.readouterr().out) == ["skipped", "resumed", "ran"]
    assert Path("runs/c/sft/hf/model.safetensors").stat().st_size > 100


def test_from_runs_a_stage_and_the_later_ones_anew(chain, capsys):
    del chain["stages"]["more"]
    assert run(chain) == 0
    capsys.readouterr()
    assert run(chain, "--from", "sft") == 0
    assert states(capsys.readouterr().out) == ["skipped", "ran", "ran"]


def test_a_broken_stage_is_resumed_from_its_checkpoint(chain, capsys):
    Path("broken").touch()
    del chain["stages"]["more"]
    assert run(chain) == 130
    printed = capsys.readouterr()
    assert states(printed.out) == ["ran", "failed", "not reached"]
    assert "chain stopped at sft" in printed.err
    assert not Path("runs/c/sft/finished.json").exists()
    Path("broken").unlink()
    assert run(chain) == 0
    assert states(capsys.readouterr().out) == ["skipped", "resumed", "ran"]
    assert Path("epochs.txt").read_text() == "0 1 1 "  # not 0 again


def test_a_folder_with_a_run_of_somebody_else_is_left_alone(chain, capsys):
    Path("runs/c/sft/checkpoints").mkdir(parents=True)
    assert run(chain) == 2
    assert "runs/c/sft holds a run that this chain has not started" in capsys.readouterr().err


MISTAKES = {
    "stage's config": ({"sft": {"config": "nowhere.yaml"}}, "there is no file nowhere.yaml"),
    "both": ({"sft": {"config": "sft.yaml", "class_path": "steps.Make"}}, "give either config"),
    "key": ({"sft": {"config": "sft.yaml", "override": {}}}, "did you mean overrides?"),
    "later stage": ({"sft": {"config": "sft.yaml", "overrides": {"data.train": "${more.hf}"}}}, "it runs later"),
    "output": ({"more": {"config": "sft.yaml", "overrides": {"data.train": "${sft.hff}"}}}, "did you mean hf?"),
    "variable": ({"sft": {"config": "sft.yaml", "overrides": {"seed_everything": "${sed}"}}}, "did you mean seed?"),
    "class": ({"data": {"class_path": "steps.Nothing"}}, "cannot import steps.Nothing"),
    "argument": ({"data": {"class_path": "steps.Make", "init_args": {"outdir": "x"}}}, "did you mean out_dir?"),
    "missing": ({"data": {"class_path": "steps.Make"}}, "needs out_dir"),
    "folder": ({"sft": {"config": "sft.yaml", "overrides": {"trainer.default_root_dir": "runs/x"}}}, "leave it out"),
    "override": ({"more": {"config": "sft.yaml", "overrides": {"data.batchsize": 3}}}, "did you mean batch_size?"),
    "whose": ({"more": {"config": "sft.yaml", "overrides": {"data.batchsize": 3}}}, "chain.yaml: stages.more: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_anything_runs(chain, capsys, name):
    change, said = MISTAKES[name]
    chain["stages"] |= change
    assert run(chain) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


def test_in_another_folder_no_stage_reads_what_the_usual_one_holds(chain, capsys):
    more = yaml.safe_load(Path("more.yaml").read_text())
    more["model"]["init_args"]["policy"]["path"] = "runs/c/sft/hf"
    Path("more.yaml").write_text(yaml.safe_dump(more))
    del chain["stages"]["more"]["overrides"]["model.policy.path"]
    assert run(chain, "--set", "run_dir=runs/d") == 2
    assert "override model.init_args.policy.path" in capsys.readouterr().err
    assert strays(more, {"model.policy": None}, "runs/c") == []
    assert strays({"rewards": [{"init_args": {"path": "runs/c/x"}}]}, {}, "runs/c") == [
        ("rewards.init_args.path", "runs/c/x")
    ]


@pytest.mark.parametrize("option", ["--set=sed=2", "--set=seed", "--from=nowhere"])
def test_mistakes_on_the_command_line(chain, option):
    assert run(chain, option) == 2
    assert not Path("runs").exists()


def test_a_reference_alone_keeps_its_type():
    assert substitute({"a": ["${n}", "x${n}"]}, {"n": 3}, "here") == {"a": [3, "x3"]}
    with pytest.raises(UserError, match="did you mean seed"):
        substitute("${sed}", {"seed": 1}, "here")


def test_settings_change_variables_and_stages(chain):
    Path("chain.yaml").write_text(yaml.safe_dump(chain, sort_keys=False))
    spec = read_chain("chain.yaml", ["seed=7", "run_dir=runs/d", "sft.trainer.max_epochs=5", "data.num=2"])
    assert spec.variables == {"seed": 7, "num": 4, "run_dir": "runs/d"}
    assert spec.stages[1].overrides["trainer.max_epochs"] == 5
    assert spec.stages[0].init_args["num"] == 2


def test_fingerprints_see_content_and_names(tmp_path):
    (tmp_path / "a").write_text("1")
    before = fingerprint_path(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint_path(tmp_path) != before
    assert fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1})
    assert existing_paths({"x": [str(tmp_path), "auto", "no/such"]}) == [str(tmp_path)]


@pytest.mark.slow
def test_a_stage_of_two_processes_gets_a_process_of_its_own(chain, capfd):
    chain["stages"] = {name: chain["stages"][name] for name in ("data", "sft")}
    chain["stages"]["sft"]["overrides"] |= {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_epochs": 1}
    assert run(chain) == 0
    assert "MEMBER: 2/2" in "".join(capfd.readouterr())
    assert Path("runs/c/sft/hf/model.safetensors").exists()
