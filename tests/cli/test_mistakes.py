"""How options are read, and what is said of those that cannot be meant."""

import json
import re
from pathlib import Path

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import yaml
from command_line import ALLOW, fit, write
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from rlhf_lightning.__main__ import main
from rlhf_lightning.advantages.kl_control import KLControl
from rlhf_lightning.cli.app import family
from rlhf_lightning.cli.options import in_other_packages, wanted_bases
from rlhf_lightning.cli.sources import ConfigSources, Place
from rlhf_lightning.core.interfaces import PolicyLoss, RewardFn

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_users_own_stage_is_selected_by_its_path(config):
    options = ["--model", "mine.MySFT", "--model.gain", "2.0", "--trainer.fast_dev_run", "true", *ALLOW]
    assert fit(config, *options) == 0


def test_print_config_round_trips(config, capsys):
    assert fit(config, "--print_config") == 0
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    assert main(["fit", "--config", "printed.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


def test_abbreviations_are_refused(config, capsys):
    assert fit(config, "--trainer.max_epoch", "1") == 2
    assert "did you mean max_epochs?" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_1e_4_is_a_number(config, capsys):
    text = Path(write(config)).read_text().replace("lr: 0.001", "lr: 1e-4")
    Path("sft.yaml").write_text(text)
    assert main(["fit", "--config", "sft.yaml", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert float(printed["model"]["init_args"]["optimizer"]["init_args"]["lr"]) == 1e-4


def test_abbreviations_are_answered_with_what_they_begin(config, capsys):
    assert fit(config, "--trainer.max_ep", "1") == 2
    assert "did you mean max_epochs?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{path: train.jsonl, weight: 0}", "source train.jsonl: weight=0.0 must be above 0"),
        ("[{path: train.jsonl, limit: 0}]", "source train.jsonl: limit=0 must be at least 1"),
        ("{path: train.jsonl, format: jsnl}", "data.train.format: jsnl is not one of the choices; did you mean jsonl?"),
        ("{weight: 2}", "bad.yaml:1: data.train: path is missing there"),
    ],
)
def test_a_source_that_cannot_be_meant(config, capsys, source, message):
    Path("bad.yaml").write_text(f"data: {{train: {source}}}\n")
    assert fit(config, "--config", "bad.yaml") == 2
    assert message in capsys.readouterr().err


def test_an_unknown_key_of_a_source_on_the_command_line_is_no_path(config, capsys):
    assert fit(config, "--data.train", '[{"path": "train.jsonl", "wieght": 2}]') == 2
    assert "wieght is no option of a source (did you mean weight?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("packing=true", "data.packing does nothing: this stage reads pairs"),
        ("train_on=all", "data.train_on does nothing: this stage reads pairs"),
        ("pretraining=train.jsonl", "data.pretraining does nothing: RewardModule trains on no second source"),
    ],
)
def test_data_options_that_do_nothing_for_the_stage_are_errors(config, capsys, tiny_model, option, message):
    config["model"] = {"class_path": "RewardModule", "init_args": {"model": {"path": str(tiny_model)}}}
    assert fit(config, f"--data.{option}") == 2
    assert f"command line: --{message}" in capsys.readouterr().err


def test_a_typo_below_the_class_of_a_kl_controller(config, capsys):
    config["model"]["class_path"] = "PPOModule"
    config["model"]["init_args"]["kl"] = {"control": {"class_path": "FixedKL", "init_args": {"coeff": 0.1}}}
    assert fit(config) == 2
    assert "coeff is not an option of FixedKL; did you mean coef?" in capsys.readouterr().err


ELSEWHERE = {
    "an option of a section": (
        "--model.lr",
        "--model.lr is not an option of SFTModule; did you mean model.optimizer.lr?",
    ),
    "an option without its section": ("--batch_size", "--batch_size is not a section; did you mean data.batch_size?"),
    "TRL's name": ("--learning_rate", "TRL's learning_rate is model.optimizer.lr here (docs/from_trl.md)"),
    "TRL's name in a section": ("--trainer.num_train_epochs", "TRL's num_train_epochs is trainer.max_epochs here"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_option_in_the_wrong_place_is_answered_with_the_right_one(config, capsys, name):
    option, message = ELSEWHERE[name]
    assert fit(config, option, "3") == 2
    assert message in capsys.readouterr().err


def test_trls_names_are_those_of_the_page(config):
    from rlhf_lightning.cli.trl_names import OURS

    rows = [row.split("|") for row in (REPOSITORY / "docs/from_trl.md").read_text().splitlines() if row.startswith("|")]
    for theirs, ours in OURS.items():
        if theirs in ("model_name_or_path", "dataset_name"):  # of its scripts, not of its trainers
            continue
        answers = [row[2] for row in rows if f"`{theirs}`" in row[1]]
        assert answers, theirs
        assert any(ours in answer or ours.rpartition(".")[0] + "`" in answer for answer in answers), theirs


def test_a_class_that_the_command_line_names_is_not_looked_for_in_the_file(config, capsys):
    config["model"]["init_args"]["loss"] = {"class_path": "NLL"}
    assert fit(config, "--model.loss", "NNLL") == 2
    assert "command line: --model.loss: NNLL is not a known class; did you mean NLL?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "near"),
    [
        ("--model.loss", "Xyz", r"choose one of .*\bNLL\b.* \("),
        ("--model.optimizer", "Adamm", r"did you mean Adam\?"),
        ("--trainer.callbacks", "[{class_path: Helth}]", r"did you mean Health\?"),
    ],
)
def test_what_is_proposed_for_an_unknown_class_fits(option, value, near, config, capsys):
    assert fit(config, option, value) == 2
    said = capsys.readouterr().err
    assert re.search(rf"is not a known class; {near}", said), said
    assert "AOT" not in said, "a loss of another stage"


def test_an_optimiser_of_bitsandbytes_is_known_by_its_full_name():
    """That package is imported when a config names it: `AdamW8bit` alone is the name of nothing before."""
    pytest.importorskip("bitsandbytes", reason="pip install 'rlhf-lightning[quant]'")
    assert in_other_packages("AdamW8bit", [Optimizer]) == "bitsandbytes.optim.AdamW8bit"
    assert in_other_packages("AdamW9bit", [Optimizer]) is None
    assert in_other_packages("AdamW8bit", [Logger]) is None


def test_bases_are_found_below_sections_lists_and_parents():
    family()
    sources = ConfigSources([Place("model.class_path", "", 0, "GRPOModule")])
    wanted = {"model.loss": PolicyLoss, "model.kl.control": KLControl, "model.rewards.reward": RewardFn}
    for key, base in wanted.items():
        assert wanted_bases(key, sources) == [base]
    assert wanted_bases("model.seed", sources) == wanted_bases("model.nonsense.below", sources) == []
    assert wanted_bases("model.loss", ConfigSources([])) == []


def test_options_of_a_stage_without_a_stage(config, capsys):
    assert main(["fit", "--model.policy.path", "base", "--data.train", "train.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "--model.policy.path is given, but no stage that it could be an option of: give --config FILE" in said
    assert main(["fit", "--model.policy.path", "base", "--config", write(config)]) == 2
    said = capsys.readouterr().err
    assert "--model.policy.path stands before the --config that names the stage: put --config first" in said
    assert fit(config, "--model", "models/base") == 2
    assert "models/base is no stage; where the weights are is said by --model.policy.path" in capsys.readouterr().err


def test_a_class_whose_module_cannot_be_imported_is_named_with_the_reason(config, capsys):
    Path("broken.py").write_text("from rlhf_lightning import NoSuchThing\n")
    config["model"]["class_path"] = "broken.Stage"
    assert fit(config, "--allow_module", "broken") == 2
    said = capsys.readouterr().err
    assert "sft.yaml:10: model.class_path: broken.Stage: cannot import name 'NoSuchThing'" in said


def test_a_config_of_any_name_is_looked_through(config, capsys):
    Path("run.conf").write_text("seed_everything: 1\nseed_everything: 2\n")
    assert fit(config, "--config", "run.conf") == 2
    assert "run.conf:2: seed_everything is set twice" in capsys.readouterr().err
    assert main(["fit", "--config", "train.jsonl"]) == 2
    assert "train.jsonl" in capsys.readouterr().err


def test_a_reward_that_is_not_wrapped_is_answered_with_how(config, capsys):
    config["model"]["class_path"] = "PPOModule"
    config["model"]["init_args"]["rewards"] = ["ExactMatch"]
    assert fit(config) == 2
    assert "does not fit here; write {reward: {class_path: ExactMatch}}" in capsys.readouterr().err


TYPOS = {
    "trainer": ("max_epochs: 2", "max_epoch: 2", "trainer.max_epoch", "max_epochs"),
    "data": ("batch_size: 4", "batchsize: 4", "data.batchsize", "batch_size"),
    "stage": ("optimizer:", "optimiser:", "model.init_args.optimiser", "optimizer"),
    "model spec": ("tokenizer:", "tokeniser:", "model.init_args.policy.tokeniser", "tokenizer"),
    "optimizer": ("lr: 0.001", "lrr: 0.001", "model.init_args.optimizer.init_args.lrr", "lr"),
    "section": ("data:", "dta:", "dta", "data"),
    "stage's name": ("SFTModule", "SFTModul", "SFTModul", "SFTModule"),
    "class": ("torch.optim.AdamW", "torch.optim.AdamWW", "AdamWW", "AdamW"),
}


@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_is_an_error_that_names_key_file_line_and_the_right_name(config, capsys, name):
    right, wrong, key, meant = TYPOS[name]
    text = Path(write(config)).read_text()
    assert right in text
    Path("typo.yaml").write_text(text.replace(right, wrong))
    line = next(i for i, row in enumerate(text.replace(right, wrong).splitlines(), 1) if wrong in row)
    assert main(["fit", "--config", "typo.yaml"]) == 2
    message = capsys.readouterr().err
    assert f"typo.yaml:{line}: " in message
    assert key in message
    assert f"did you mean {meant}?" in message.replace("torch.optim.", "")
    assert len(message.strip().splitlines()) == 1


SCHEDULER = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_siz": 3}}
PLATEAU = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitr": "val/loss"}}
PATTERN = {"class_path": "RegexFormat", "init_args": {"pattern": "x"}}


def test_a_scheduler_that_watches_a_metric_runs_from_a_config_and_the_rest_of_its_module_does_not(config, capsys):
    watching = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "val/loss"}}
    config["model"]["init_args"]["lr_scheduler"] = watching
    config["data"]["val"] = "train.jsonl"
    assert fit(config) == 0
    watching["class_path"] = "lightning.pytorch.cli.LightningCLI"
    assert fit(config, "--overwrite", "true") == 2
    assert "lightning.pytorch.cli.LightningCLI starts processes or loads code" in capsys.readouterr().err


MISSPELT = {
    "scheduler": ("model.init_args.lr_scheduler", SCHEDULER, "step_siz", "step_size"),
    "scheduler that watches": ("model.init_args.lr_scheduler", PLATEAU, "monitr", "monitor"),
    "optimizer": (
        "model.init_args.optimizer",
        {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "weight_deca": 0.1}},
        "weight_deca",
        "weight_decay",
    ),
    "optimizer's init_args": (
        "model.init_args.optimizer",
        {"class_path": "torch.optim.AdamW", "init_arg": {"lr": 0.1}},
        "init_arg",
        "init_args",
    ),
    "callback": (
        "trainer.callbacks",
        [{"class_path": "SampleLogger", "init_args": {"num_prompt": 3}}],
        "num_prompt",
        "num_prompts",
    ),
    "callback's init_args": (
        "trainer.callbacks",
        [{"class_path": "SampleLogger", "init_arg": {"num_prompts": 3}}],
        "init_arg",
        "init_args",
    ),
    "field of a list's item": ("model.init_args.rewards", [{"reward": PATTERN, "wight": 2}], "wight", "weight"),
    "class in a list's item": (
        "model.init_args.rewards",
        [{"reward": PATTERN}, {"reward": {**PATTERN, "init_args": {"patern": "x"}}}],
        "patern",
        "pattern",
    ),
    "plain section": ("model.init_args.policy", {"pth": "x"}, "pth", "path"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_key_is_named_with_its_place_and_the_nearest_name(config, capsys, name):
    key, value, wrong, meant = MISSPELT[name]
    if key.endswith("rewards"):
        config["model"]["class_path"] = "GRPOModule"
    *above, last = key.split(".")
    section = config
    for part in above:
        section = section[part]
    before = {last: section[last]} if last in section else {}
    section[last] = value
    assert fit(config) == 2
    said = capsys.readouterr().err
    line = next(i for i, row in enumerate(Path("sft.yaml").read_text().splitlines(), 1) if f"{wrong}:" in row)
    assert said.startswith(f"error: sft.yaml:{line}: {key}.")
    assert f".{wrong} is not an option of " in said
    assert f"did you mean {meant}?" in said

    del section[last]
    section |= before
    short = key.replace("init_args.", "")
    assert fit(config, f"--{short}={json.dumps(value)}") == 2, "as JSON on the command line"
    said = capsys.readouterr().err
    assert said.startswith(f"error: command line: --{short}.")
    assert f".{wrong} is not an option of " in said
    assert f"did you mean {meant}?" in said


WRONG_VALUES = {
    "type": ("batch_size: 4", "batch_size: four", "four is not a whole number"),
    "nested type": ("lr: 0.001", "lr: fast", "fast is not a number"),
    "not a number": ("lr: 0.001", "lr: .nan", ".nan is not a number"),
    "negative": ("lr: 0.001", "lr: -0.001", "a learning rate is positive"),
    "twice": ("batch_size: 4", "batch_size: 4\n  batch_size: 5", "data.batch_size is set twice"),
    "negative clipping": ("max_epochs: 2", "max_epochs: 2\n  gradient_clip_val: -1", "trainer.gradient_clip_val=-1"),
    "no accumulation": ("max_epochs: 2", "max_epochs: 2\n  accumulate_grad_batches: 0", "batches=0: give at least 1"),
    "no text": ("batch_size: 4", "batch_size: 4\0", "not YAML: unacceptable character"),
    "no YAML": ("batch_size: 4", "batch_size: [4", "not YAML"),
    "tag": ("batch_size: 4", "batch_size: !!python/object/apply:os.system [ls]", "is not allowed"),
    "import": ("torch.optim.AdamW", "os.system", "os.system is Python's own"),
    "function": (
        "batch_size: 4",
        "batch_size: 4\n  x: {class_path: PythonFunction, init_args: {path: 'os:system'}}",
        "os:system is Python's own",
    ),
    "strategy": ("max_epochs: 2", "max_epochs: 2\n  strategy: ddpp", "did you mean ddp?"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_is_an_error_with_its_place(config, capsys, name):
    right, wrong, said = WRONG_VALUES[name]
    Path("wrong.yaml").write_text(Path(write(config)).read_text().replace(right, wrong))
    assert main(["fit", "--config", "wrong.yaml"]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "wrong.yaml:" in message
    assert "Traceback" not in message


def test_a_section_cannot_be_set_to_null_on_the_command_line(config, capsys):
    Path("prompts.jsonl").write_text('{"prompt": "the film"}\n')
    model = config["model"]["init_args"]["policy"]
    rewards = [{"reward": {"class_path": "LengthReward"}}]
    init_args = {"policy": model, "rewards": rewards, "critic": {"model": model}}
    config |= {"model": {"class_path": "PPOModule", "init_args": init_args}, "data": {"train": "prompts.jsonl"}}
    assert fit(config, "--model.critic.model", "null") == 2
    said = capsys.readouterr().err
    assert "--model.critic.model: a section cannot be set to null on the command line" in said
    assert "model: null in this place as a further --config" in said


def test_inert_keys_of_stage_and_trainer_are_errors(config, capsys):
    config["model"]["class_path"] = "mine.MySFT"
    config["model"]["init_args"]["gain"] = 0.5
    config["trainer"]["gradient_clip_algorithm"] = "norm"
    assert fit(config, *ALLOW) == 2
    message = capsys.readouterr().err
    assert "model.init_args.gain does nothing: a half gain is none" in message
    assert "trainer.gradient_clip_algorithm does nothing: gradient_clip_val is not set" in message
    assert message.count("sft.yaml:") == 2


def test_a_saved_config_has_no_inert_keys_although_it_names_every_key(config):
    assert fit(config, "--trainer.max_steps", "1") == 0
    assert main(["validate", "--config", "runs/a/config.yaml", "--data.val", "train.jsonl"]) == 0


@pytest.mark.parametrize("content", ["", "the film was good", "- a\n- b", '{"path": "other.jsonl"}'])
def test_a_data_file_is_never_read_as_a_piece_of_config(config, capsys, content):
    Path("some.json").write_text(content)
    for given in (["--data.train", "some.json"], []):
        config["data"]["train"] = "some.json"
        assert main(["fit", "--config", write(config), *given, "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["data"]["train"] == "some.json"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fti"], "did you mean 'fit'?"),
        (["fit"], "model is missing"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["chain"], "--config"),
        (["chain", "--conf", "x"], "--config"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2(config, capsys, args, said):
    assert main(args) == 2
    assert said in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(config, capsys):
    Path("file").write_text("")
    assert fit(config, "--trainer.default_root_dir", "file/run") == 2
    assert "cannot write to file/run (Not a directory): name another folder by" in capsys.readouterr().err
    ask = ["generate", "--config", "sft.yaml", "--prompt", "the film"]
    for out, said in (("file/answers.jsonl", "cannot write to file"), (".", "--out . is a folder")):
        assert main([*ask, "--out", out]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert "> the film" not in captured.out
    assert main(["export", "--config", "sft.yaml", "--ckpt_path", "null", "--folder", "file/hf"]) == 2
    assert "cannot write to file" in capsys.readouterr().err


def test_validation_without_records_is_an_error(config, capsys):
    assert main(["validate", "--config", write(config)]) == 2
    assert "there are no val records: set data.val or data.val_frac" in capsys.readouterr().err


def test_a_precision_that_would_cast_batches_is_refused(config, capsys):
    config["trainer"]["precision"] = "bf16-true"
    assert fit(config) == 2
    message = capsys.readouterr().err
    assert "sft.yaml:" in message
    assert "trainer.precision: bf16-true would cast" in message
    assert "use bf16-mixed" in message


def test_debug_shows_the_traceback(config, capsys):
    assert main(["fit", "--config", "nowhere.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_missing_model_folder(config, capsys):
    config["model"]["init_args"]["policy"] = {"path": "models/nothing"}
    assert fit(config) == 2
    assert "models/nothing" in capsys.readouterr().err


def test_a_short_name_is_one_of_ours_whoever_else_has_one_like_it():
    """pyparsing, which matplotlib brings along, has an abstract class with a Keyword below it."""
    import pyparsing

    from rlhf_lightning.cli.options import known_classes
    from rlhf_lightning.rewards import Keyword

    assert pyparsing.Keyword.__name__ == "Keyword"
    assert known_classes()["Keyword"] is Keyword


def test_a_class_of_ours_in_the_wrong_place_is_called_that(config, capsys):
    grpo = {
        "class_path": "GRPOModule",
        "init_args": {
            "policy": config["model"]["init_args"]["policy"],
            "rewards": [{"reward": {"class_path": "LengthReward"}}],
            "loss": {"class_path": "DPO"},
        },
    }
    assert fit(config | {"model": grpo}) == 2
    said = capsys.readouterr().err
    assert "DPO is a PreferenceLoss, which does not fit here" in said
    assert "did you mean DPO" not in said
