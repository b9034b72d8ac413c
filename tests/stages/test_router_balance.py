"""The load-balancing loss of a step is the same however the step is cut, in every stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import fit
from one_step import records, step

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.router import experts_chosen, load_balancing_loss
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import PPOModule, SFTModule, splitting
from rlhf_lightning.stages.router_balance import RouterBalance

SUPPORT = Path(__file__).parents[1] / "support" / "one_step.py"
MICRO = {"batch_size": 5, "accumulate": 3}
ON_POLICY = {"accumulate": 5}


@pytest.fixture(scope="module")
def moe(tiny_experts) -> str:
    return str(tiny_experts)


@pytest.fixture(scope="module")
def whole(moe, tmp_path_factory):
    """A stage's step in one piece, taken when first asked for."""
    folder, known = tmp_path_factory.mktemp("whole"), {}

    def taken(stage: str):
        if stage not in known:
            path = folder / f"{stage}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records(stage.split(", balanced")[0])))
            known[stage] = (str(path), *step(stage, moe, str(path)))
        return known[stage]

    return taken


def assert_same(expected, found):
    for name in ("router/aux_loss", "router/max_load"):
        assert found[0][name] == pytest.approx(expected[0][name], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_rows_in_which_nothing_counts_hold_no_sequences():
    tokens = torch.ones(2, 4, dtype=torch.long)
    real, segments = torch.ones(2, 4, dtype=torch.bool), torch.tensor([[1, 1, 2, 2], [1, 1, 1, 1]])
    batch = TokenBatch(tokens, real, real, torch.zeros_like(tokens), segments)
    for rows, sequences in ((batch, 3.0), (batch.without_loss(), 0.0), (batch.part(1, 2), 1.0)):
        assert list(RouterBalance(0.5, "sequence").measure(None, [rows]).values()) == [sequences]


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("sft, balanced per step", MICRO),
        ("sft, balanced per sequence", MICRO),
        ("sft, balanced per step", {"data": {"packing": True, "max_length": 24}, "batch_size": 2, "accumulate": 100}),
        ("sft, balanced per sequence", {"data": {"packing": True, "max_length": 24}}),
        ("reward, balanced per step", MICRO),
        ("kto, balanced per step", MICRO),
        ("dpo, balanced per step", {**MICRO, "attributes": {"share_prompts": True}}),
        ("dpo, triples, balanced per step", MICRO),
        ("dpo, ranked, balanced per sequence", MICRO),
        ("ppo, balanced per step", ON_POLICY),
        ("grpo, balanced per step", {**ON_POLICY, "spec": {"gradient_checkpointing": True}}),
        ("grpo, balanced per sequence", ON_POLICY),
        ("online dpo, balanced per step", ON_POLICY),
        ("gkd, balanced per step", {"accumulate": 4}),
    ],
)
def test_the_cut_does_not_matter(stage, how, whole, moe):
    path, *expected = whole(stage)
    assert_same(expected, step(stage, moe, path, **how))


@pytest.mark.slow
def test_two_processes_that_share_the_weights_take_the_same_step_as_one(whole, moe, tmp_path):
    path, *expected = whole("sft, balanced per step")
    out = tmp_path / "rank0.pt"
    command = [sys.executable, str(SUPPORT), "sft, balanced per step", moe, path, str(out), "fsdp2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert out.is_file(), done.stderr[-2000:]
    saved = torch.load(out, weights_only=True)
    assert_same(expected, (saved["metrics"], saved["gradients"]))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_memory_has_no_room_for_is_cut_and_stays_the_same(where, whole, moe, monkeypatch):
    path, *expected = whole("sft, balanced per step")
    failed = []

    def out_of_memory(self, *args, **kwargs):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")
        return own(self, *args, **kwargs)

    owner, name = (SFTModule, "training_step") if where == "forward" else (splitting.Splitter, "_backward_of_graph")
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, out_of_memory)
    assert_same(expected, step("sft, balanced per step", moe, path))
    assert failed


def test_a_second_source_is_balanced_with_the_answers(moe, write_jsonl, tmp_path):
    data = {
        "train": write_jsonl("prompts.jsonl", [{"prompt": "the film"}, {"prompt": "a plot was"}]),
        "pretraining": write_jsonl("texts.jsonl", [{"text": "the film was good"}, {"text": "dull"}]),
        "batch_size": 2,
    }
    found = []
    for ptx_coef in (0.0, 1e-9):
        module = PPOModule(
            ModelSpec(path=moe),
            [WeightedReward(LengthReward(target=4))],
            ptx_coef=ptx_coef,
            updates=UpdateSpec(inner_epochs=1),
            router_aux_loss_coef=0.5,
            generation=GenerationSpec(max_new_tokens=4),
            seed=1,
        )
        used = {name: value for name, value in data.items() if ptx_coef or name != "pretraining"}
        found.append(fit(module, tmp_path, data=used, accumulate_grad_batches=2).callback_metrics["router/aux_loss"])
    assert float(found[0]) != pytest.approx(float(found[1]), abs=1e-4)


def test_the_loss_is_added_with_its_weight(whole, moe):
    path, metrics, gradients = whole("sft, balanced per step")
    without = step("sft", moe, path)[1]
    twice = step("sft", moe, path, attributes={"router_balance": RouterBalance(1.0, "step")})[1]
    name = "policy.model.model.layers.0.mlp.gate.weight"
    assert float((gradients[name] - without[name]).abs().max()) > 1e-4
    torch.testing.assert_close(twice[name] - without[name], 2 * (gradients[name] - without[name]), rtol=1e-3, atol=1e-5)
    assert 0.5 <= metrics["router/max_load"] <= 1


def test_by_hand():
    # three tokens, two experts, one each; the last token does not count
    chosen = torch.tensor([[[[0]], [[0]], [[1]]]])
    counts = torch.tensor([[True, True, False]])
    loads = experts_chosen(chosen, counts, torch.zeros(1, 3).long(), num_groups=1, num_experts=2)
    assert loads.tolist() == [[[2.0, 0.0]]]
    probs = torch.tensor([0.9 + 0.7, 0.1 + 0.3])
    # f = (1, 0), P = (0.8, 0.2)
    assert load_balancing_loss(probs, loads[0, 0], torch.tensor(2.0)).item() == pytest.approx(2 * 0.8)
    even = load_balancing_loss(torch.tensor([3.0, 3.0]), torch.tensor([6.0, 6.0]), torch.tensor(6.0))
    assert even.item() == 2.0  # two experts a token, used alike: top_k


def test_a_dense_model_has_no_routers(tiny_model):
    module = SFTModule(ModelSpec(path=str(tiny_model)), router_aux_loss_coef=0.001)
    with pytest.raises(UserError, match=r"router_aux_loss_coef=0.001 .* models of type 'llama' have no router.*set it"):
        module.configure_model()


def test_what_it_is_taken_over_is_inert_without_it(tiny_model):
    module = SFTModule(ModelSpec(path=str(tiny_model)), router_aux_loss_over="sequence")
    assert dict(module.inert_options()) == {"router_aux_loss_over": "router_aux_loss_coef is 0"}
