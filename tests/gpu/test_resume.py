"""A run on the GPU that is stopped and resumed, and the same run twice, end with the same bits."""

import json

import pytest
import torch
from on_gpu import ACCELERATOR, or_skip

or_skip()

from one_step import PREFERENCES, UNPAIRED, records, step
from parallel_fits import resumed

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo", "grpo"])
def test_resuming_ends_with_the_same_bits(stage, strategy, tiny_model, tmp_path):
    (tmp_path / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
    case = resumed(stage, lambda: strategy, accelerator=ACCELERATOR, deterministic=True)
    found = case(str(tiny_model), tmp_path, 1)
    whole, again = found["whole"], found["resumed"]
    assert len(whole["losses"]) in (4, 8)
    assert again["losses"] == whole["losses"]
    different = [name for name, weight in whole["weights"].items() if not torch.equal(again["weights"][name], weight)]
    assert not different


KINDS = ("sft", "taught", "gkd", "reward", "reward, steps", *PREFERENCES, *UNPAIRED, "ppo", "grpo", "online dpo")


@pytest.mark.parametrize("stage", KINDS)
def test_a_deterministic_trainer_takes_the_same_step_twice(stage, tiny_model, tmp_path):
    """`trainer.deterministic: true` refuses operations that have no such form: no stage needs one."""
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
    options = {"accelerator": ACCELERATOR, "deterministic": True, "batch_size": 6, "accumulate": 2}
    gradients = [step(stage, str(tiny_model), str(path), **options)[1] for _ in range(2)]
    assert gradients[0]
    assert not [name for name, gradient in gradients[0].items() if not torch.equal(gradient, gradients[1][name])]
