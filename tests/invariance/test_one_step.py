"""A step's loss and gradients do not depend on how the step was cut, padded, packed, ordered or shared out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_step import PREFERENCES, records, step

SUPPORT = Path(__file__).parents[1] / "support" / "one_step.py"
LOSS = {
    "sft": "train/loss",
    "taught": "train/loss",
    "reward": "train/loss",
    "reward, steps": "train/loss",
    "ppo": "policy/loss",
    "grpo": "policy/loss",
}
LOSS |= dict.fromkeys((*PREFERENCES, "online dpo", "gkd"), "train/loss")
LOSS |= {"kto": "train/loss", "kto, cached": "train/loss", "bco": "train/loss"}
# an on-policy stage cuts its rollouts itself: a batch is always the 12 prompts of the step
CUTS = {
    "micro-batches of 3": {"batch_size": 3, "accumulate": 4},
    "micro-batches of 5, 5 and 2": {"batch_size": 5, "accumulate": 3},
    "gradient checkpointing": {"spec": {"gradient_checkpointing": True}},
    "reversed order": {"reverse": True},
    "wider padding": {"data": {"pad_to_multiple_of": 16}},
}
CASES = [("sft", name, how) for name, how in CUTS.items()]
CASES += [("taught", name, how) for name, how in CUTS.items()]
CASES += [("reward", name, how) for name, how in CUTS.items()]
CASES += [("kto", name, how) for name, how in CUTS.items()]
CASES += [("dpo", name, how) for name, how in CUTS.items()]
OTHERS = ("kto, cached", "bco", "dpo, cached", "dpo, drawn pairs", "dpo, ranked", "dpo, triples", "reward, steps")
CASES += [(stage, "micro-batches of 5, 5 and 2", CUTS["micro-batches of 5, 5 and 2"]) for stage in OTHERS]
CASES += [(stage, "reversed order", {"reverse": True}) for stage in OTHERS]
CASES += [
    (stage, "padding on the left", {"data": {"padding_side": "left"}})
    for stage in (
        "sft",
        "taught",
        "reward",
        "reward, steps",
        "kto",
        "kto, cached",
        "dpo",
        "dpo, cached",
        "dpo, drawn pairs",
        "dpo, ranked",
    )
]
CASES += [
    ("dpo", "each prompt computed once", {"attributes": {"share_prompts": True}}),
    ("sft", "packing", {"data": {"packing": True, "max_length": 24}}),
    ("taught", "packing", {"data": {"packing": True, "max_length": 24}}),
    ("sft", "packing, rows of two", {"data": {"packing": True, "max_length": 24}, "batch_size": 2, "accumulate": 100}),
    ("sft", "token budget", {"data": {"tokens_per_batch": 40}, "batch_size": 8, "accumulate": 100}),
    ("kto", "token budget", {"data": {"tokens_per_batch": 60}, "batch_size": 8, "accumulate": 100}),
]
PADDING_FREE = {"spec": {"padding_free": True}}
CASES += [
    (stage, "without padding", PADDING_FREE)
    for stage in ("sft", "taught", "reward", "reward, steps", "kto", "dpo", "dpo, ranked")
]
CASES += [
    ("sft", "packing, without padding", {"data": {"packing": True, "max_length": 24}, **PADDING_FREE}),
    ("dpo", "without padding, each prompt computed once", {"attributes": {"share_prompts": True}, **PADDING_FREE}),
    (
        "reward",
        "without padding, checkpointed",
        {"spec": {"padding_free": True, "gradient_checkpointing": True}},
    ),
]
ON_POLICY = {
    "micro-batches of 3": {"accumulate": 4},
    "micro-batches of 3, 3, 2, 2 and 2": {"accumulate": 5},
    "gradient checkpointing": {"spec": {"gradient_checkpointing": True}},
    "reversed order": {"reverse": True},
    "without padding": PADDING_FREE,
    "wider padding on the left": {"attributes": {"extra_left": 5}},
    "wider padding on the right": {"attributes": {"extra_right": 3}},
    "prompts padded on the right": {"attributes": {"pads_on_the_right": True}},
}
CASES += [(stage, name, how) for stage in ("ppo", "grpo", "online dpo") for name, how in ON_POLICY.items()]
# a batch of records beside each micro-batch: five do not share out twelve
CASES += [("gkd", name, how) for name, how in ON_POLICY.items() if how.get("accumulate") != 5]


SHARING = ("bco", "dpo, cached", "dpo, ranked", "dpo, triples", "reward, steps", "taught")


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """One batch, padded on the right, in file order: metrics and gradients of each stage."""
    folder = tmp_path_factory.mktemp("whole")
    results = {}
    for stage in LOSS:
        path = folder / f"{stage}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
        results[stage] = (str(path), *step(stage, str(tiny_model), str(path)))
    return results


def assert_same(stage, expected, metrics, gradients):
    want_metrics, want_gradients = expected
    assert metrics[LOSS[stage]] == pytest.approx(want_metrics[LOSS[stage]], abs=1e-5)
    assert gradients.keys() == want_gradients.keys()
    largest = max(float(g.abs().max()) for g in want_gradients.values())
    assert largest > 1e-3, "a comparison of zeros shows nothing"
    for name, gradient in gradients.items():
        # float32 sums in another order: 1e-5 of the largest entry
        torch.testing.assert_close(gradient, want_gradients[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(("stage", "name", "how"), CASES, ids=[f"{stage}, {name}" for stage, name, _ in CASES])
def test_the_cut_does_not_matter(stage, name, how, whole, tiny_model, tmp_path):
    path, *expected = whole[stage]
    how = dict(how)
    if how.pop("reverse", False):
        reversed_path = tmp_path / "reversed.jsonl"
        reversed_path.write_text("".join(reversed(Path(path).read_text().splitlines(keepends=True))))
        path = str(reversed_path)
    assert_same(stage, expected, *step(stage, str(tiny_model), path, **how))


@pytest.mark.slow
# those left out share what the ranks of kto, dpo, reward and gkd do
@pytest.mark.parametrize("stage", [stage for stage in LOSS if stage not in SHARING])
def test_two_processes_take_the_same_step_as_one(stage, whole, tiny_model, tmp_path):
    path, *expected = whole[stage]
    out = tmp_path / "rank0.pt"
    command = [sys.executable, str(SUPPORT), stage, str(tiny_model), path, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert out.is_file(), done.stderr[-2000:]
    saved = torch.load(out, weights_only=True)
    assert_same(stage, expected, saved["metrics"], saved["gradients"])
    for name, value in expected[0].items():  # what a rollout looked like is said of those of all processes
        if name.startswith(("rollout/", "reward/", "groups/", "policy/", "value/", "kl/", "train/")):
            assert saved["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
