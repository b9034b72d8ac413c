"""Model folders that bring code, pickles or the name of another model; names that could be a folder or the hub's."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.__main__ import main
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.names import OURS, looks_like_a_path
from rlhf_lightning.core.trust import only_from
from rlhf_lightning.data.readers import Source, read_source
from rlhf_lightning.data.tokenizers import find_tokenizer
from rlhf_lightning.models.loading import load_policy, load_scalar_model, load_tokenizer
from rlhf_lightning.models.locate import check_code, resolve_path
from rlhf_lightning.models.spec import ModelSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(config: dict, file: str = "fit.yaml") -> str:
    Path(file).write_text(yaml.safe_dump(config, sort_keys=False))
    return file


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (self.mark,)


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

open({mark!r}, "w")


class Config(LlamaConfig):
    model_type = "own"


class Model(LlamaForCausalLM):
    config_class = Config
"""


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


@pytest.fixture
def folder(config, tiny_model, tmp_path, monkeypatch) -> Path:
    """A model folder to spoil, in the working directory."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(tiny_model, "stranger_model")
    return Path("stranger_model")


def with_code(folder: Path, mark: Path) -> None:
    """As models on the hub bring code: for an architecture of their own."""
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(folder / "config.json", model_type="own", auto_map=code)
    (folder / "own.py").write_text(OWN.format(mark=str(mark)))


def use(config: dict, folder: Path | str, **more: Any) -> dict:
    config["model"]["init_args"]["policy"] = {"path": str(folder), **more}
    return config


# --- pickles

NAMES = ("pytorch_model.bin", "pytorch_model.pt", "model.pth")


@pytest.mark.parametrize("name", NAMES)
def test_pickled_weights_are_refused_with_the_remedy(config, folder, mark, refused, works, name):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1), "bomb": Bomb(mark)}, folder / name)
    write(use(config, folder))
    for command in (["fit"], ["generate", "--prompt", "film"], ["export", "--ckpt_path", "null"]):
        said = refused(command[0], "--config", "fit.yaml", *command[1:])
        assert f"holds its weights as a pickle ({name})" in said
        assert "save_pretrained" in said
    for load in (load_policy, load_scalar_model):
        with pytest.raises(UserError, match="as a pickle"):
            load(ModelSpec(path=str(folder)))
    works(lambda: torch.load(folder / name, weights_only=False))


def test_an_index_leads_to_safetensors_in_the_folder_only(config, folder, mark, refused):
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    torch.save({"bomb": Bomb(mark)}, folder / "evil.bin")
    for shard in ("evil.bin", "../evil.safetensors", "/etc/evil.safetensors"):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert f"model.safetensors.index.json names '{shard}'" in refused("fit", "--config", write(use(config, folder)))


def test_a_pickle_beside_safetensors_is_not_opened(config, folder, mark):
    torch.save({"bomb": Bomb(mark)}, folder / "pytorch_model.bin")
    assert main(["fit", "--config", write(use(config, folder)), "--trainer.fast_dev_run", "true"]) == 0
    assert not mark.exists()


# --- code


def test_code_of_a_model_is_not_run(config, folder, mark, refused, works):
    with_code(folder, mark)
    write(use(config, folder))
    for command in (["fit"], ["preview"], ["generate", "--prompt", "film"], ["export", "--ckpt_path", "null"]):
        said = refused(command[0], "--config", "fit.yaml", *command[1:])
        assert "comes with custom code (config.json: auto_map), which is not run" in said
    works(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True))


def test_code_of_a_tokenizer_is_not_run(config, folder, tiny_config, mark, refused, works):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]}, tokenizer_class="Own")
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Tokenizer: pass\n")
    config["model"]["init_args"]["policy"] = {"config": tiny_config, "tokenizer": str(folder)}
    assert "tokenizer_config.json: auto_map" in refused("fit", "--config", write(config))
    with pytest.raises(UserError, match="auto_map"):
        find_tokenizer(str(folder))
    with pytest.raises(UserError, match="auto_map"):
        load_tokenizer(ModelSpec(path=str(folder)))
    works(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=True))


def test_a_config_cannot_trust_in_the_users_place(config, folder, mark, refused):
    with_code(folder, mark)
    write(use(config, folder, trust_remote_code=True))
    said = refused("fit", "--config", "fit.yaml")
    assert "a config cannot ask for that alone" in said
    assert f"--allow_module {folder}" in said
    allowed = ["--allow_module", str(folder), "--trainer.fast_dev_run", "true"]
    assert main(["fit", "--config", "fit.yaml", *allowed]) == 0
    assert mark.exists()


def test_code_of_another_repository_is_never_fetched(folder, mark):
    with_code(folder, mark)
    edit(folder / "config.json", auto_map={"AutoConfig": "stranger/code--own.Config"})
    with only_from([str(folder)]), pytest.raises(UserError, match="code of another repository"):
        load_policy(ModelSpec(path=str(folder), trust_remote_code=True))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_code_for_a_layer_is_not_fetched_from_the_hub(config, folder, refused, key):
    edit(folder / "config.json", **{key: "stranger/attention"})
    said = refused("fit", "--config", write(use(config, folder)))
    assert f"config.json: {key} names code on a hub ('stranger/attention')" in said
    edit(folder / "config.json", **{key: None}, text_config={key: {"full": "stranger/attention@main"}})
    with pytest.raises(UserError, match="names code on a hub"):
        load_scalar_model(ModelSpec(path=str(folder)))


def test_nor_by_a_config_that_is_given_in_yaml(config, tiny_config, refused):
    policy = config["model"]["init_args"]["policy"]
    policy["config"] = tiny_config | {"text_config": {"_attn_implementation": "stranger/attention"}}
    assert "names code on a hub" in refused("fit", "--config", write(config))


def test_transformers_itself_would_fetch_it_without_being_asked_to_trust(folder):
    edit(folder / "config.json", _attn_implementation="stranger/attention")
    with pytest.raises(ImportError, match="kernels"):  # the package that downloads and imports it
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12]])
def test_code_from_the_hub_is_that_of_one_commit(config, revision):
    with only_from(["owner/name"]):
        check_code("owner/name", True, COMMIT)
        with pytest.raises(UserError, match="full hash of the commit"):
            check_code("owner/name", True, revision)
    with only_from(()), pytest.raises(UserError, match="--allow_module owner/name"):
        check_code("owner/name", True, COMMIT)


def test_an_adapter_that_names_another_model_is_refused(config, folder, refused):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "stranger/elsewhere"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    said = refused("fit", "--config", write(use(config, folder)))
    assert "holds an adapter" in said
    assert "merge_and_unload" in said
    (folder / "config.json").unlink()
    assert "holds an adapter" in refused("fit", "--config", "fit.yaml")
    with pytest.raises(OSError, match="We couldn't connect to"):  # where transformers would have gone
        AutoModelForCausalLM.from_pretrained(folder)


# --- names


@pytest.mark.parametrize(
    "name", [f"{first}/x" for first in OURS] + ["./x", "../x", "~/x", "/x", "a/b/c", "x/", "s3://x"]
)
def test_what_looks_like_a_folder_is_never_asked_for_on_the_hub(config, name):
    assert looks_like_a_path(name)
    with pytest.raises(UserError, match="does not exist"):
        resolve_path(name)
    with pytest.raises(UserError, match="no such file or folder"):
        read_source(Source(path=name))
    with pytest.raises(UserError, match="no such folder"):
        find_tokenizer(name)


def test_a_name_is_a_folder_first_and_the_hubs_only_if_that_is_said(config, folder):
    assert resolve_path(str(folder)) == str(folder)
    assert resolve_path("owner/name") == "owner/name"
    assert resolve_path("hf://owner/name") == "owner/name"
    assert resolve_path("hf://runs/name") == "runs/name"
    for wrong in ("hf://", "hf://a/b/c", "hf://../x", "hf:///etc", "hf://.hidden/x"):
        with pytest.raises(UserError, match="give hf://owner/name"):
            resolve_path(wrong)
    # transformers takes a folder of that name, whatever it was asked for
    with pytest.raises(UserError, match="in a place that has no folder of that name"):
        resolve_path(f"hf://{folder}")
    with pytest.raises(UserError, match="in a place that has no file or folder stranger_model"):
        read_source(Source(path="hf://stranger_model"))
