import json

import pytest
import torch
from fits import fit
from one_step import another, records
from safetensors import safe_open

import rlhf_lightning.stages.kto as stage
import rlhf_lightning.stages.reference_cache as cache
from rlhf_lightning.losses.unpaired import KTO, APOZeroUnpaired
from rlhf_lightning.models.digest import weights_digest
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import KTOModule


@pytest.fixture
def unpaired(write_jsonl):
    return write_jsonl("kto.jsonl", records("kto"))


@pytest.fixture
def train(tiny_model, unpaired, tmp_path):
    """Trains a few steps with the reference on disk, all of it or some of it otherwise; gives metrics and weights."""

    def run(folder=tmp_path / "reference", loss=KTO(beta=0.5), reference=None, precision="32-true", **data):
        module = KTOModule(
            ModelSpec(path=str(tiny_model)),
            loss,
            reference=another(str(tiny_model)) if reference is None else reference,
            reference_cache=None if folder is None else str(folder),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        options = {"train": unpaired, "val": unpaired, "batch_size": 5, "max_length": 32} | data
        trainer = fit(module, tmp_path, data=options, max_epochs=2, precision=precision)
        return trainer.callback_metrics, module.policy.state_dict()

    return run


def test_training_is_the_same_as_with_the_reference_in_memory(train):
    metrics, weights = train(folder=None)
    for _ in range(2):  # measured, then read
        cached_metrics, cached_weights = train()
        assert cached_metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            assert float(cached_metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
        for name, value in weights.items():
            torch.testing.assert_close(cached_weights[name], value, rtol=1e-5, atol=1e-6)


def test_it_is_measured_once_and_training_holds_no_second_model(train, tmp_path, monkeypatch):
    train()
    files = sorted(path.name for path in (tmp_path / "reference").iterdir())
    assert files == ["train.safetensors", "val.safetensors"]
    with safe_open(tmp_path / "reference" / "train.safetensors", "pt") as file:
        assert file.get_tensor("logprobs").dtype == torch.float32
        assert set(file.metadata()) == {"measured_with", "origin"}

    def never(*args, **kwargs):
        raise AssertionError("a second model was loaded")

    monkeypatch.setattr(cache, "load_policy", never)
    monkeypatch.setattr(stage, "make_reference", never)
    train()


def test_a_data_set_that_was_not_measured_yet_is_added(train, tmp_path):
    train()
    (tmp_path / "reference" / "val.safetensors").unlink()
    train()
    assert (tmp_path / "reference" / "val.safetensors").is_file()


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"max_length": 8}, r"max_length was 32 and is 8"),
        ({"add_eos": False}, r"add_eos was True and is False"),
        ({"loss": APOZeroUnpaired()}, r"batch_format was mismatched and is unpaired"),
        ({"precision": "bf16-mixed"}, r"precision was 32-true and is bf16-mixed"),
    ],
)
def test_a_stale_file_is_refused_by_what_has_changed(train, changed, what):
    train()
    with pytest.raises(ValueError, match=rf"train.safetensors was measured with something else: {what}\. Delete the"):
        train(**changed)


def test_other_weights_are_refused(train, tiny_model):
    train()
    with pytest.raises(ValueError, match=r"the reference's weights were \w{8}\.\.\. and are \w{8}\.\.\."):
        train(reference=ModelSpec(path=str(tiny_model)))


def test_other_records_in_the_same_file_are_refused(train, unpaired):
    train()
    made = records("kto")
    made[3]["completion"] = "long"
    with open(unpaired, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in made)
    with pytest.raises(ValueError, match="the records of its sources have changed, or their order"):
        train()


def test_an_option_that_changes_no_token_keeps_the_file(train):
    train()
    train(max_length=48, padding_side="left", batch_size=3)


def test_a_file_that_is_broken_says_so(train, tmp_path):
    train()
    (tmp_path / "reference" / "train.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"train.safetensors cannot be read .*: delete it, and it is measured anew"):
        train()


def test_a_run_that_dies_while_measuring_leaves_no_file(train, tmp_path, monkeypatch):
    def dies(*args, **kwargs):
        args[1].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "save_file", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train()
    assert not list((tmp_path / "reference").iterdir())


def test_it_needs_the_records_of_our_datamodule(tiny_model, tmp_path):
    import lightning as L

    module = KTOModule(ModelSpec(path=str(tiny_model)), reference_cache=str(tmp_path / "reference"))
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"keyed by the records of an RLHFDataModule.*leave reference_cache out"):
        trainer.fit(module, train_dataloaders=[1])


def test_the_digest_is_of_the_weights_alone(tiny_model, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    spec = ModelSpec(path=str(copy))
    assert weights_digest(spec) == weights_digest(ModelSpec(path=str(tiny_model)))
    (copy / "README.md").write_text("other words")
    assert weights_digest(spec) == weights_digest(ModelSpec(path=str(tiny_model)))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_digest(spec) != weights_digest(ModelSpec(path=str(tiny_model)))
    new = another(str(tiny_model))
    assert weights_digest(new) != weights_digest(ModelSpec(config=new.config, tokenizer=new.tokenizer, seed=8))
