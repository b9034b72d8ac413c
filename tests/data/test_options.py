import inspect

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.options import DEFAULTS

CONTRADICTIONS = [
    ({"val": "a", "val_frac": 0.1}, "val and val_frac=0.1 both say what is held out"),
    ({"packing": True, "tokens_per_batch": 64}, "packing and tokens_per_batch=64 both say how rows are filled"),
    ({"packing": True, "padding_side": "left"}, "padding_side: left contradicts it"),
    ({"max_length": 8, "max_prompt_length": 9}, "max_prompt_length=9 is above max_length=8"),
    ({"max_length": 1}, "max_length=1 must be at least 2"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"val_frac": 1.5}, "val_frac=1.5 is a share"),
    ({"train": None, "val_frac": 0.1}, "holds out a share of train, which is not set"),
    ({"num_workers": -1}, "num_workers=-1"),
]


@pytest.mark.parametrize(
    ("options", "message"), CONTRADICTIONS, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_contradicting_options_are_refused_at_once(options, message):
    with pytest.raises(UserError, match=message):
        RLHFDataModule(**{"train": "a.jsonl", **options})


INERT = [
    ({}, "tokens", {}),
    ({"batch_size": 4}, "tokens", {}),
    ({"batch_size": 4, "tokens_per_batch": 64}, "tokens", {"batch_size"}),
    ({"drop_last": True, "tokens_per_batch": 64}, "tokens", {"drop_last"}),
    ({"packing": True}, "tokens", {}),
    ({"packing": True}, "pairs", {"packing"}),
    ({"train_on": "all"}, "pairs", {"train_on"}),
    ({"step_separator": "\n\n"}, "pairs", {"step_separator"}),
    ({"step_separator": "\n\n"}, "steps", {}),
    ({"eval_batch_size": 4}, "tokens", {"eval_batch_size"}),
    ({"eval_batch_size": 4, "val": "b.jsonl"}, "tokens", {}),
    ({"pretraining_batch_size": 4}, "prompts", {"pretraining_batch_size"}),
    ({"pretraining_batch_size": 4, "pretraining": "b.jsonl"}, "prompts", {}),
    ({"cut_first": "completion", "overlong": "drop"}, "tokens", {"cut_first"}),
    ({"cut_first": "completion"}, "prompts", {"cut_first"}),
    ({"padding_side": "left", "add_eos": False}, "prompts", {"padding_side", "add_eos"}),
    ({"padding_side": "left", "add_eos": False}, None, {}),
]


@pytest.mark.parametrize(("options", "batch_format", "keys"), INERT)
def test_options_that_do_nothing_are_named(options, batch_format, keys):
    found = dict(RLHFDataModule("a.jsonl", **options).inert_options(batch_format))
    assert set(found) == set(keys)
    assert all(found.values())


def test_the_defaults_are_those_of_the_signature():
    signature = inspect.signature(RLHFDataModule.__init__).parameters
    assert {name: signature[name].default for name in DEFAULTS} == DEFAULTS
