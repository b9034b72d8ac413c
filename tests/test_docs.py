"""What the pages promise exists, and what exists is on the pages."""

import csv
import inspect
import itertools
import json
import re
import shlex
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import torch
import yaml

from rlhf_lightning import advantages, losses, rewards
from rlhf_lightning.__main__ import SUBCOMMANDS, main
from rlhf_lightning.advantages import AdaptiveKL, FixedKL, Gae
from rlhf_lightning.advantages.pairs import PairRule
from rlhf_lightning.cli.app import check_command_line
from rlhf_lightning.core.interfaces import (
    CompletionScores,
    Credit,
    PairScores,
    PolicyLoss,
    PreferenceLoss,
    RankedPreferenceLoss,
    RewardFn,
    Sample,
)
from rlhf_lightning.core.masked import Reduction
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.readers import Source
from rlhf_lightning.losses import (
    BCO,
    KTO,
    XPO,
    APOZeroUnpaired,
    BradleyTerry,
    ClippedSurrogate,
    ClippedValue,
    Distillation,
    NashMD,
    PlackettLuce,
    Regression,
    SamplerCorrection,
    StepCorrectness,
)
from rlhf_lightning.losses.divergence import Divergence
from rlhf_lightning.models.reference import BEMA, ReferenceSync
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec
from rlhf_lightning.pipelines.chain_spec import read_chain
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.python_function import PythonFunction
from rlhf_lightning.rollout import GenerationSpec, HFContinuousBatching, VLLMEngine, VLLMServer
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.prefix import PrefixSpec
from rlhf_lightning.rollout.replay import ReplaySpec
from rlhf_lightning.stages import (
    DPOModule,
    GKDModule,
    GRPOModule,
    KTOModule,
    OnlineDPOModule,
    PPOModule,
    RewardModule,
    SFTModule,
)
from rlhf_lightning.stages.grpo import DynamicSampling
from rlhf_lightning.stages.online_dpo import Opponent
from rlhf_lightning.stages.schedule import Schedule

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))
STAGE_PAGES = {
    "docs/sft.md": SFTModule,
    "docs/reward.md": RewardModule,
    "docs/dpo.md": DPOModule,
    "docs/kto.md": KTOModule,
    "docs/ppo.md": PPOModule,
    "docs/grpo.md": GRPOModule,
    "docs/online_dpo.md": OnlineDPOModule,
    "docs/distillation.md": GKDModule,
}
METRIC = re.compile(
    r"(?:train|val|test|rollout|rewards|reward|logps|displacement|pairs|policy|value|kl|sampling|groups|correction|ptx|time"
    r"|throughput)/[\w<>]+"
)


def page(name: str) -> str:
    return (REPOSITORY / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])


# --- options


def arguments(cls: type) -> list[str]:
    return [name for name, p in inspect.signature(cls).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


def nested(cls: type) -> dict[str, list[str]]:
    """Options of the frozen dataclasses that are a stage's defaults, by the stage's option."""
    options = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if hasattr(parameter.default, "__dataclass_fields__"):
            options[name] = [field.name for field in fields(parameter.default)]
    return options


PREFERENCE_LOSSES = [
    cls
    for name in losses.__all__
    if isinstance(cls := getattr(losses, name), type)
    and issubclass(cls, PreferenceLoss | RankedPreferenceLoss | Divergence)
]
ONLINE_LOSSES = [XPO, NashMD]
for cls in ONLINE_LOSSES:  # need an opponent: docs/online_dpo.md
    PREFERENCE_LOSSES.remove(cls)
POLICY_LOSSES = [cls for cls in vars(losses).values() if isinstance(cls, type) and issubclass(cls, PolicyLoss)]
CREDITS = [
    cls
    for cls in vars(advantages).values()
    if isinstance(cls, type) and issubclass(cls, Credit) and not inspect.isabstract(cls)
]
CREDITS.remove(Gae)  # needs a critic: docs/ppo.md
REWARDS = [cls for cls in vars(rewards).values() if isinstance(cls, type) and issubclass(cls, RewardFn)]
PROMISES = [
    *((name, cls) for name, cls in STAGE_PAGES.items()),
    *(("docs/reward.md", cls) for cls in (BradleyTerry, PlackettLuce, Regression, StepCorrectness)),
    *(("docs/dpo.md", cls) for cls in (BEMA, ReferenceSync, *PREFERENCE_LOSSES)),
    *(("docs/ppo.md", cls) for cls in (ClippedSurrogate, ClippedValue, Gae, FixedKL, AdaptiveKL, WeightedReward)),
    *(("docs/ppo.md", cls) for cls in (GenerationSpec, UpdateSpec)),
    *(("docs/grpo.md", cls) for cls in POLICY_LOSSES + CREDITS),
    *(("docs/grpo.md", cls) for cls in (DynamicSampling, PrefixSpec, ReplaySpec, SamplerCorrection, ReferenceSync)),
    *(("docs/online_dpo.md", cls) for cls in (PairRule, Opponent, ReferenceSync, *ONLINE_LOSSES)),
    *(("docs/rewards.md", cls) for cls in (WeightedReward, *REWARDS)),
    *(("docs/kto.md", cls) for cls in (KTO, APOZeroUnpaired, BCO)),
    *(("docs/engines.md", cls) for cls in (HFContinuousBatching, VLLMEngine, VLLMServer)),
    ("docs/distillation.md", Distillation),
    ("docs/sft.md", Schedule),
    ("docs/models.md", ModelSpec),
    ("docs/models.md", LoraSpec),
    ("docs/memory.md", QuantizationSpec),
    ("docs/data.md", RLHFDataModule),
    ("docs/data.md", Source),
]


@pytest.mark.parametrize(("name", "cls"), PROMISES, ids=lambda value: getattr(value, "__name__", value))
def test_every_option_is_on_its_page(name, cls):
    said = " ".join(code_spans(page(name)))
    below = {key: options for key, options in nested(cls).items() if key != "schedule"}  # on docs/sft.md
    options = arguments(cls) + [option for options in below.values() for option in options]
    # those of an engine are the stage's to give
    options = [option for option in options if option not in ("spec", "tokenizer")]
    missing = [option for option in options if not re.search(rf"\b{option}\b", said)]
    assert not missing, f"{name} does not speak of {missing} of {cls.__name__}"


@pytest.mark.parametrize(("name", "cls"), STAGE_PAGES.items())
def test_every_option_on_a_page_exists(name, cls):
    table = page(name).split("## Options")[1].split("\n## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    keys = [key for row in rows for key in code_spans(row)]
    real = {*arguments(cls), *(f"{name}.{option}" for name, below in nested(cls).items() for option in below)}
    assert keys
    assert set(keys) <= real


# --- metrics


RECORDS = {
    SFTModule: {"prompt": "the film", "completion": "was good"},
    DPOModule: {"prompt": "the film", "chosen": "was good", "rejected": "was bad", "gold": "was great"},
    RewardModule: {"prompt": "the film", "chosen": "was good", "rejected": "was bad"},
    KTOModule: {"prompt": "the film", "completion": "was good"},
    PPOModule: {"prompt": "the film"},
    GRPOModule: {"prompt": "the film"},
    OnlineDPOModule: {"prompt": "the film"},
    GKDModule: {"prompt": "the film"},
}
VARIANTS: dict[type, list[dict[str, Any]]] = {
    SFTModule: [{}, {"teacher": {}, "loss": {"class_path": "Distillation", "init_args": {"nll_coef": 0.5}}}],
    DPOModule: [{}, {"loss": {"class_path": "TPO", "init_args": {"loss": {"class_path": "DPO"}}}}],
    KTOModule: [{}, {"loss": {"class_path": "BCO"}}],
    OnlineDPOModule: [{}, {"opponent": {}}],
    GKDModule: [{"teacher": {}, "loss": {"class_path": "Distillation", "init_args": {"nll_coef": 0.5}}}],
}
"""Options of a stage under which it logs what it does not by default."""


def logged(cls: type, folder: Path, model: Path, options: dict[str, Any]) -> set[str]:
    """Names of all metrics of one training step and one evaluation, reward functions' names taken out."""
    records = [RECORDS[cls] | {"prompt": f"the film {word}"} for word in ("was", "good", "bad", "long")]
    if cls is KTOModule:
        records = [record | {"label": i % 2 == 0} for i, record in enumerate(records)]
    folder.mkdir()
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = folder / "texts.jsonl"
    texts.write_text(json.dumps({"text": "the film was good"}) + "\n")
    init_args: dict[str, Any] = {arguments(cls)[0]: {"path": str(model)}} | options
    if "teacher" in options:
        init_args["teacher"] = {"path": str(model)}
    data: dict[str, Any] = {
        "train": str(folder / "records.jsonl"),
        "val": str(folder / "records.jsonl"),
        "batch_size": 4,
    }
    if cls is OnlineDPOModule:
        init_args["rewards"] = [{"reward": {"class_path": "LengthReward"}, "name": "NAME"}]
        init_args["generation"] = {"max_new_tokens": 3, "num_samples": 4}
    if cls is GKDModule:
        init_args["rewards"] = [{"reward": {"class_path": "LengthReward"}, "name": "NAME"}]
        init_args |= {
            "generation": {"max_new_tokens": 3},
            "on_policy_frac": 0.5,
            "updates": {"inner_epochs": 1, "async_rollouts": True},
        }
        data["pretraining"] = str(texts)
    if cls in (PPOModule, GRPOModule):
        init_args["rewards"] = [{"reward": {"class_path": "LengthReward"}, "name": "NAME"}]
        init_args |= {
            "generation": {"max_new_tokens": 3, "top_k": 5, "keep_logprobs": True},
            "updates": {"inner_epochs": 1, "async_rollouts": True},
            "correction": {"cap": 2.0},
            "ptx_coef": 0.5,
            "entropy_coef": 0.1,
            "entropy_control": {"target": 1.0},
        }
        data["pretraining"] = str(texts)
    if cls is GRPOModule:
        init_args["generation"]["num_samples"] = 4
        init_args |= {
            "dynamic_sampling": {"max_batches": 2},
            "replay": {"capacity": 2},
            "off_policy_threshold": 0.5,
        }
    trainer = {"default_root_dir": str(folder / "run"), "max_epochs": 1, "accelerator": "cpu"}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    model_config = {"class_path": cls.__name__, "init_args": init_args}
    config = {"trainer": trainer, "default_callbacks": [], "model": model_config, "data": data}
    (folder / "run.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", str(folder / "run.yaml")]) == 0
    with (folder / "run" / "metrics.csv").open() as file:
        names = set(next(csv.reader(file)))
    return {name.replace("NAME", "<name>") for name in names if "/" in name}


@pytest.mark.parametrize(("name", "cls"), STAGE_PAGES.items())
def test_every_metric_is_on_its_page_and_none_but_these(name, cls, tmp_path, tiny_model):
    variants = enumerate(VARIANTS.get(cls, [{}]))
    real = {metric for i, options in variants for metric in logged(cls, tmp_path / str(i), tiny_model, options)}
    said = {metric for span in code_spans(page(name)) for metric in METRIC.findall(span)}
    assert real - said == set(), f"{name} lacks metrics"
    of_tests = {metric.replace("val/", "test/") for metric in real}
    assert said - real - of_tests == set(), f"{name} names metrics that nothing logs"


# --- paths, commands, YAML


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_path_exists(name):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page(name)) if "://" not in link]
    missing = [link for link in links if not ((REPOSITORY / name).parent / link).exists()]
    roots = {path.name for path in REPOSITORY.iterdir()} - {"runs"}
    paths = [span for span in code_spans(page(name)) if "/" in span and span.split("/")[0] in roots and " " not in span]
    missing += [path for path in paths if not set("*<") & set(path) and not (REPOSITORY / path).exists()]
    assert not missing


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(([^)#]+)\)", page("README.md")))
    assert {name for name in PAGES if name != "README.md"} <= linked


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_real(name):
    makefile = (REPOSITORY / "Makefile").read_text()
    everything = page(name)
    spoken = [*code_spans(everything), *(line for block in blocks(name, "") for line in block.splitlines())]
    for line in (line.split("#")[0].strip() for line in spoken):
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line
        match = re.match(r"(?:PYTHONPATH=examples )?rlhf-lightning ([a-z]+)(.*)", line)
        if match is None or "..." in line:
            continue
        assert match[1] in SUBCOMMANDS, line
        if "PYTHONPATH" not in line and ".help" not in line and "--help" not in line:
            read_command(shlex.split(line)[1:])


def read_command(command: list[str]) -> None:
    """As the command line would; a config that only the reader has is stood in for."""
    stand_in = {"chain": "configs/chain.yaml"}.get(command[0], "configs/sft.yaml")
    command = [stand_in if word.endswith(".yaml") and not Path(word).exists() else word for word in command]
    if command[0] == "chain":
        options = {"--set": [], "--config": []}
        for word, value in itertools.pairwise(command):
            options.get(word, []).append(value)
        read_chain(options["--config"][0], options["--set"])
    elif "--config" in command:
        assert check_command_line([word for word in command if word != "--print_config"]) == 0


@pytest.mark.parametrize(
    ("name", "block"), [(name, block) for name in PAGES for block in blocks(name, "yaml")], ids=lambda value: value[:24]
)
def test_every_yaml_on_a_page_can_be_read(name, block, tmp_path):
    if "bitsandbytes.optim" in block:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'rlhf-lightning[quant]'")
    content = yaml.safe_load(block)
    file = tmp_path / "block.yaml"
    if "stages" in content:
        file.write_text(block)
        read_chain(file)
        return
    if "policy" in content:
        content = {"model": {"class_path": "SFTModule", "init_args": content}}
    file.write_text(yaml.safe_dump(content))
    needs_more = not {"model", "data"} <= set(content)
    configs = ["--config", "configs/sft.yaml"] if needs_more else []
    assert check_command_line(["fit", *configs, "--config", str(file), "--allow_module", "my_rewards.py"]) == 0


# --- the README's tables and snippets


def algorithm_rows() -> list[list[str]]:
    table = page("README.md").split("## What works")[1].split("\n## ")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row.startswith("|")][
        2:
    ]


def test_the_algorithm_table_names_only_what_exists():
    rooms = [import_module(f"rlhf_lightning.{room}") for room in ("stages", "losses", "advantages", "rewards")]
    rows = algorithm_rows()
    assert len(rows) > 10
    for row in rows:
        names = code_spans(f"{row[2]} {row[3]}")
        assert all(any(hasattr(room, name) for room in rooms) for name in names), row
        assert ("not yet" in row) != bool(names), row


def grpo_rows() -> list[list[str]]:
    table = page("docs/grpo.md").split("## An algorithm is a row")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("row", grpo_rows(), ids=lambda row: row[0].split("(")[0].strip())
def test_every_row_of_the_grpo_table_is_a_stage(row, tiny_model):
    name, credit, loss, reduction, _ = row
    credits = [span for span in code_spans(credit) if ":" not in span]
    policy_losses = [span for span in code_spans(loss) if ":" not in span]
    assert bool(credits) == bool(policy_losses) == (credit != "as DAPO"), name
    assert reduction in get_args(Reduction), name
    for one in policy_losses:
        GRPOModule(
            ModelSpec(path=str(tiny_model)),
            [WeightedReward(rewards.LengthReward(target=3))],
            credit=getattr(advantages, credits[0])(),
            loss=getattr(losses, one)(),
            reduction=reduction,
        )


def test_the_readme_names_every_extra():
    table = page("README.md").split("| extra |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(PROJECT["project"]["optional-dependencies"])


def test_the_floor_map_is_the_one_that_is_enforced():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    enforced = [{room.strip().rpartition(".")[2] for room in layer.split("|")} for layer in layers]
    drawn = re.findall(r"^(\d)  ((?:[\w/]+/ +)+)", page("README.md"), re.MULTILINE)
    assert [int(number) for number, _ in drawn] == list(range(len(layers)))[::-1]
    assert [{room.strip("/").rpartition("/")[2] for room in rooms.split()} for _, rooms in drawn] == enforced
    for _, rooms in drawn:
        for room in rooms.split():
            assert any((REPOSITORY / base / room).is_dir() for base in ("rlhf_lightning", ".")), room


def test_the_snippets_of_the_readme_do_what_they_say(tmp_path):
    function, loss, reward, stage = blocks("README.md", "python")
    known: dict[str, Any] = {"__name__": "mine"}  # nothing but what the snippets import
    for snippet in (loss, reward, stage):
        exec(snippet, known)
    (tmp_path / "my_rewards.py").write_text(function)
    polite = PythonFunction(f"{tmp_path / 'my_rewards.py'}:politeness")
    samples = [Sample("hello", "please", {"answer": "yes"}), Sample("hello", "no", {"answer": "no"})]
    assert list(polite(samples)) == [1.0, 0.0]
    assert known["Exact"]()(samples) == [0.0, 1.0]
    logprobs, old = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-2.0]])
    output = known["Reinforce"]()(logprobs, old, torch.tensor([[3.0]]), torch.tensor([[True]]))
    # the ratio e^1 weighs the gradient of the log-likelihood
    assert torch.autograd.grad(output.per_token.sum(), logprobs)[0].item() == pytest.approx(-3 * torch.e)
    assert issubclass(known["ShortPPO"], PPOModule)


def test_a_credit_and_a_preference_loss_of_ones_own():
    known: dict[str, Any] = {"__name__": "mine"}
    for name in ("docs/grpo.md", "docs/dpo.md"):
        exec(blocks(name, "python")[0], known)
    rewards, mask, groups = torch.tensor([[1.0], [4.0]]), torch.tensor([[True], [True]]), torch.tensor([0, 0])
    lead, returns = known["AboveMean"]()(rewards, torch.zeros_like(rewards), mask, groups)
    assert lead.tolist() == [[-1.0], [1.0]]
    assert torch.equal(returns, rewards)

    def scored(logprob: float) -> CompletionScores:
        return CompletionScores(
            torch.tensor([[logprob]], requires_grad=True), torch.tensor([[True]]), torch.tensor([[-2.0]])
        )

    # 0.5 (1 + 1) is the margin that it wants
    output = known["Squared"](beta=0.5)(PairScores(scored(-1.0), scored(-3.0)))
    assert output.per_pair.tolist() == [0.0]
    assert output.chosen_rewards.tolist() == [0.5]
