"""Under a real Trainer: a resumed run sees exactly the records that the stopped one had not."""

import json
import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning.data.datamodule import RLHFDataModule

pytestmark = pytest.mark.filterwarnings("ignore:.*(exists and is not empty|when using `ckpt_path`).*")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Listener(L.LightningModule):
    """A stage that learns nothing and writes down what it is given."""

    batch_format = "tokens"

    def __init__(self, tokenizer, *, asks_for_steps=False, wraps=False):
        super().__init__()
        self.tokenizer = tokenizer
        self.asks_for_steps, self.wraps = asks_for_steps, wraps
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], 0

    def wrap_train_dataloader(self, loader):
        return OneByOne(loader) if self.wraps else loader

    def training_step(self, batch, batch_index):
        self.seen.append((self.current_epoch, batch.tokens.tolist()))
        return self.weight * 0.0

    def validation_step(self, batch, batch_index):
        self.validated += len(batch.tokens)

    def configure_optimizers(self):
        if self.asks_for_steps:  # makes the trainer ask for the loader before the checkpoint's states are restored
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OneByOne:
    """What an on-policy stage makes of the loader: an iterable of its own."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


def fit(folder, data, module, *, max_epochs=3, ckpt_path=None, callbacks=(), **options):
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)


@pytest.fixture
def path(write):
    return write([{"text": f"{i}"} for i in range(7)])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("asks_for_steps", [False, True])
def test_a_resumed_run_sees_exactly_what_is_left(tokenizer, path, tmp_path, asks_for_steps, num_workers):
    def make():
        data = RLHFDataModule(path, batch_size=2, num_workers=num_workers)
        return data, Listener(tokenizer, asks_for_steps=asks_for_steps)

    data, whole = make()
    each_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, data, whole, callbacks=[each_step])
    assert len(whole.seen) == 12
    assert len({json.dumps(batch) for epoch, batch in whole.seen if epoch == 1}) == 4
    for stop in (2, 4, 5) if num_workers == 0 else (5,):  # in an epoch, behind its last batch, in the next
        data, rest = make()
        fit(tmp_path, data, rest, ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert rest.seen == whole.seen[stop:]


def test_report_is_written_and_validation_covers_every_record(tokenizer, path, tmp_path, write):
    module = Listener(tokenizer)
    data = RLHFDataModule(path, val=write([{"text": "v"}] * 3, "val.jsonl"), batch_size=2)
    fit(tmp_path, data, module, max_epochs=1, num_sanity_val_steps=0)
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert (report["train"]["kept"], report["val"]["kept"], module.validated) == (7, 3, 3)


def test_a_wrapped_loader_keeps_its_own_state(tokenizer, path, tmp_path):
    data, module = RLHFDataModule(path, batch_size=2), Listener(tokenizer, wraps=True)
    fit(tmp_path, data, module, max_epochs=1)
    assert len(module.seen) == 4
    assert data.state_dict() == {}


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"overfit_batches": 1}, {"limit_train_batches": 0.5}])
def test_trainer_flags(tokenizer, path, tmp_path, options):
    module = Listener(tokenizer)
    fit(tmp_path, RLHFDataModule(path, batch_size=2), module, max_epochs=2, **options)
    assert len(module.seen) == {"fast_dev_run": 1, "overfit_batches": 2, "limit_train_batches": 4}[next(iter(options))]


def test_it_can_be_written_in_yaml(tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RLHFDataModule, "data")
    config = {
        "data": {
            "train": ["a.jsonl", {"path": "b.jsonl", "weight": 2, "columns": {"prompt": "question"}}],
            "val": {"path": "c.jsonl", "limit": 10},
            "pretraining": "d.jsonl",
        }
    }
    made = parser.instantiate(parser.parse_object(config)).data
    assert [source.path if hasattr(source, "path") else source for source in made.options["train"]] == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert made.options["train"][1].weight == 2
    assert made.options["val"].limit == 10
    text = parser.dump(parser.parse_object(config))
    assert parser.dump(parser.parse_string(text)) == text
