"""A stage on the GPU takes the steps that it takes on the CPU: losses, metrics, gradients, sampled answers."""

import json

import pytest
import torch
from on_gpu import ACCELERATOR, BACKEND, backend_of, or_skip

or_skip()

from one_step import PREFERENCES, UNPAIRED, another, records, step
from parallel_fits import assert_same, drawing_grpo, fit, outcome, sampling_ppo

from rlhf_lightning.losses.distillation import Distillation
from rlhf_lightning.losses.preference_online import NashMD
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GKDModule, OnlineDPOModule
from rlhf_lightning.stages.online_dpo import Opponent

pytestmark = pytest.mark.gpu

KINDS = ("sft", "taught", "gkd", "reward", "reward, steps", *PREFERENCES, *UNPAIRED, "ppo", "grpo", "online dpo")
BALANCED = (
    "sft, balanced per step",
    "dpo, balanced per sequence",
    "grpo, balanced per step",
    "ppo, balanced per sequence",
)


def one_step_of(stage, model, folder, **options):
    folder.mkdir()  # of its own: what the reference said is not read off the other device's file
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(stage.split(", balanced")[0])))
    return step(stage, str(model), str(path), **options)


@pytest.mark.parametrize("stage", KINDS)
def test_a_step_has_the_metrics_and_gradients_of_the_cpu(stage, tiny_model, tmp_path):
    options = {"accumulate": 3, "batch_size": 4} if stage == "dpo, drawn pairs" else {}
    assert_steps_alike(stage, tiny_model, tmp_path, **options)
    if not stage.startswith(("reward", "taught", "gkd")):  # divergences ask for all logits
        assert backend_of("linear_token_logprobs") == BACKEND


@pytest.mark.parametrize("stage", BALANCED)
def test_experts_are_balanced_as_on_the_cpu(stage, tiny_experts, tmp_path):
    """Two of four experts for each token, and the load-balancing loss in the gradient."""
    metrics = assert_steps_alike(stage, tiny_experts, tmp_path)
    assert metrics["router/aux_loss"] > 0


def assert_steps_alike(stage, model, folder, **options):
    want_metrics, want = one_step_of(stage, model, folder / "cpu", **options)
    metrics, gradients = one_step_of(stage, model, folder / "gpu", accelerator=ACCELERATOR, **options)
    timed = ("time/", "throughput/")
    assert metrics.keys() == want_metrics.keys()
    for name, value in want_metrics.items():
        if not name.startswith(timed):
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert gradients.keys() == want.keys()
    largest = max(float(g.abs().max()) for g in want.values())
    assert largest > 1e-3, "a comparison of zeros shows nothing"
    for name, gradient in gradients.items():
        assert gradient.device.type == ("cuda" if ACCELERATOR == "gpu" else "cpu")
        torch.testing.assert_close(gradient.cpu(), want[name], rtol=1e-4, atol=1e-5 * largest, msg=name)
    return metrics


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)  # Adam makes a step of every rounding error


def mixture(model):
    """Half of the answers by policy and reference together, each of which speaks of every token."""
    return OnlineDPOModule(
        ModelSpec(path=model),
        [WeightedReward(LengthReward(target=3))],
        NashMD(),
        reference=another(model),
        opponent=Opponent(reference_share=0.5),
        generation=GenerationSpec(max_new_tokens=6, num_samples=2),
        seed=3,
    )


def ahead(model):
    """Answers are sampled by a thread of their own, while the policy is trained."""
    module = drawing_grpo(model, "replays")
    module.updates = UpdateSpec(async_rollouts=True)
    return module


def truncated(model):
    module = drawing_grpo(model, "draws again")
    module.generation = GenerationSpec(max_new_tokens=6, num_samples=4, top_p=0.9, top_k=12, min_p=0.01)
    return module


def penalised(model):
    """Of a sampler that shuns what it has said, and one word altogether."""
    module = drawing_grpo(model, "draws again")
    module.generation = GenerationSpec(
        max_new_tokens=6, num_samples=4, repetition_penalty=1.5, suppress_tokens=["film"], keep_logprobs=True
    )
    return module


def taught(model):
    """On answers of its own, of which a teacher says how likely it finds each token."""
    return GKDModule(
        ModelSpec(path=model),
        another(model, hidden_size=24, vocab_size=32),
        Distillation("jsd", beta=0.5),
        generation=GenerationSpec(max_new_tokens=6, num_samples=2),
        seed=3,
    )


SAMPLING = {
    "ppo": sampling_ppo,
    "grpo, draws again": lambda model: drawing_grpo(model, "draws again"),
    "grpo, replays": lambda model: drawing_grpo(model, "replays"),
    "grpo, ahead": ahead,
    "grpo, truncated": truncated,
    "grpo, penalised": penalised,
    "gkd": taught,
    "online dpo, mixture": mixture,
}


@pytest.mark.parametrize("name", SAMPLING)
def test_five_steps_on_own_answers_are_those_of_the_cpu(name, tiny_model, tmp_path):
    """The numbers that tokens are drawn with are the same on every device, and so are the tokens."""
    stage = name.split(",")[0].replace("online dpo", "ppo").replace("gkd", "ppo")
    (tmp_path / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
    outcomes = []
    for accelerator in ("cpu", ACCELERATOR):
        module = SAMPLING[name](str(tiny_model))
        module.optimizer = sgd
        outcomes.append(outcome(module, fit(module, stage, tmp_path, accelerator=accelerator)))
    expected, found = outcomes
    assert len(set(expected["losses"])) > 1
    assert_same(found, expected, tolerance=1e-3, steps=len(expected["losses"]))
