"""What a plan says, and that it is what the same code holds when its tensors have numbers."""

import json
from dataclasses import replace

import pytest
import torch
from judged_fits import write_judge

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.correction import SamplerCorrection
from rlhf_lightning.losses.distillation import Distillation
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_batch import BetaDPO
from rlhf_lightning.losses.preference_mixed import TPO
from rlhf_lightning.losses.preference_ranked import ListwiseDPO
from rlhf_lightning.losses.reward_model import PlackettLuce, Regression
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec
from rlhf_lightning.planning.phases import Run, Simulation
from rlhf_lightning.planning.plan import bytes_of, largest_that_fits, make_plan, sizes_of
from rlhf_lightning.planning.report import does_not_fit, report
from rlhf_lightning.planning.shapes import Lengths, lengths_of, training_batch
from rlhf_lightning.planning.trace import MemoryTrace
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.reward_model import RewardModelScore
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
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


@pytest.fixture
def spec(tiny_config, tiny_tokenizer):
    return ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer))


def stages(spec):
    rewards = [WeightedReward(LengthReward(target=4))]
    sampling = {"generation": GenerationSpec(max_new_tokens=6, num_samples=2)}
    return {
        "sft": SFTModule(spec),
        "taught": SFTModule(spec, Distillation("jsd", nll_coef=0.1), teacher=spec),
        "sft, LoRA, checkpointing": SFTModule(replace(spec, lora=LoraSpec(), gradient_checkpointing=True)),
        "reward": RewardModule(spec),
        "reward, ranked": RewardModule(spec, PlackettLuce()),
        "reward, rated": RewardModule(spec, Regression()),
        "dpo": DPOModule(spec),
        "dpo, means": DPOModule(spec, BetaDPO()),
        "dpo, drawn pairs": DPOModule(spec, BetaDPO(keep_frac=0.5)),
        "dpo, ranked": DPOModule(spec, ListwiseDPO()),
        "dpo, triples": DPOModule(spec, TPO(DPO())),
        "kto": KTOModule(spec),
        "ppo": PPOModule(spec, rewards, **sampling),
        "grpo": GRPOModule(spec, rewards, **sampling),
        "gkd": GKDModule(spec, spec, on_policy_frac=0.5, **sampling),
        "online dpo": OnlineDPOModule(spec, rewards, DPO(), **sampling),
    }


STAGES = list(stages(ModelSpec(path="x")))
MEASURING = {"dpo, means", "dpo, drawn pairs", "kto", "ppo", "grpo"}


def simulation(module, **run):
    on_policy = module.batch_format == "prompts"
    return Simulation(module, Run(**run), Lengths(12, 6 if on_policy else 0, 3, ""))


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_can_be_planned(name, spec):
    module = stages(spec)[name]
    plan = simulation(module)
    one, two = plan.train(1), plan.train(2)
    assert getattr(module, "policy", getattr(module, "model", None)) is None, "the stage itself is not built"
    assert two.total > one.total > one.parts["weights"] + one.parts["optimiser"]
    assert (plan.measure(2) is not None) == (name in MEASURING)
    if name.startswith(("taught", "gkd", "dpo", "kto", "ppo", "grpo", "online")):
        assert one.parts["frozen models"] > 0
    if module.batch_format == "prompts":
        assert plan.generate(64).total > plan.generate(2).total


def test_a_mixture_of_experts_is_planned_with_what_its_routers_say(spec, tiny_config):
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    spec = replace(spec, config=tiny_config | experts)
    plain, balanced = (simulation(SFTModule(spec, router_aux_loss_coef=coef)).train(8).total for coef in (0.0, 0.1))
    # the probabilities of 4 experts for 96 tokens in 2 layers are kept for the backward pass
    assert balanced - plain >= 96 * 2 * 4 * 4
    sequences = SFTModule(spec, router_aux_loss_coef=0.1, router_aux_loss_over="sequence")
    assert simulation(sequences).train(8).total >= balanced


def test_shapes_hold_what_numbers_hold(spec):
    """The same step, once without numbers and once with them."""
    lengths = Lengths(20, 0, 1, "")
    predicted = Simulation(SFTModule(spec), Run(), lengths).train(6)
    module = SFTModule(spec)
    module.configure_model()
    module.splitter.more_follow = True
    batch = training_batch(module, 6, lengths)
    batch.attention_mask[0, -1] = False  # of a batch without padding attention makes no mask, and few have none
    with MemoryTrace() as trace:
        trace.adopt([*module.parameters(), *module.policy.buffers()], "weights")
        module.training_step(batch, 0).backward()
        held = trace.peak(0, trace.now())
    assert held.parts["weights"] == predicted.parts["weights"]
    assert held.total == pytest.approx(predicted.total - predicted.parts["optimiser"], rel=0.02)


def test_weights_gradients_and_adam_by_hand(spec):
    module = SFTModule(spec)
    module.configure_model()
    weights = sum(p.numel() for p in module.parameters()) * 4
    buffers = sum(b.numel() * b.element_size() for b in module.policy.buffers())
    plan = simulation(SFTModule(spec))
    assert plan.gradient_bytes == weights
    parts = plan.train(1).parts
    assert parts["weights"] == pytest.approx(weights + buffers, rel=0.01)
    assert parts["optimiser"] == pytest.approx(2 * weights, rel=0.01)  # and a counter of steps each


def test_shards_checkpointing_and_accumulation(spec):
    module = DPOModule(spec)
    whole = simulation(module).train(4).parts
    shard = simulation(module, strategy="fsdp2", processes=4, shards=4).train(4).parts
    for name in ("weights", "optimiser", "frozen models"):
        assert shard[name] == pytest.approx(whole[name] / 4, rel=0.01)
    assert shard["gathered weights"] > 0
    plain = simulation(module)
    ddp = simulation(module, strategy="ddp", processes=4).train(4).parts
    assert ddp["DDP buckets"] == plain.gradient_bytes
    again = simulation(module, accumulate=2).train(4).parts
    assert again["gradients"] > whole.get("gradients", 0)
    recomputed = Simulation(module, Run(), Lengths(12, 0, 1, ""), checkpointing=True).train(4).parts
    assert recomputed["activations"] < whole["activations"]


def test_reward_models_are_shared_out_and_gathered_to_score(spec, tiny_model, tmp_path):
    write_judge(str(tiny_model), tmp_path)
    module = stages(spec)["ppo"]
    module.rewards = [WeightedReward(RewardModelScore(str(tmp_path / "judge")))]
    module.use_reference = False
    judge = sum(p.numel() * p.element_size() for p in module.rewards[0].reward.reader.model.parameters())
    whole = simulation(module).score(4).parts
    shard = simulation(module, strategy="fsdp2", processes=4, shards=4).score(4).parts
    assert whole["frozen models"] == pytest.approx(judge, rel=0.01)
    assert shard["frozen models"] == pytest.approx(judge / 4, rel=0.01)
    assert "gathered weights" not in whole
    assert shard["gathered weights"] == judge


def test_answers_that_share_a_prompt_read_it_once(spec):
    module, lengths = stages(spec)["grpo"], Lengths(40, 34, 1, "")
    whole = Simulation(module, Run(), lengths, rollout=8)
    cut = Simulation(module, Run(), lengths)
    # two answers to each of four prompts: of 34 + 6 tokens a row, half of the prompts' are computed once
    assert whole.train(8).parts["activations"] < 0.8 * cut.train(8).parts["activations"]
    assert whole.train(4).total == cut.train(4).total  # a piece of it


def test_options_that_shapes_cannot_follow_are_named(spec):
    module = SFTModule(replace(spec, padding_free=True, activation_offload=True))
    plan = simulation(module)
    assert [note.split(" ")[0] for note in plan.notes] == ["padding_free", "activation_offload"]
    assert plan.train(2).total == simulation(SFTModule(spec)).train(2).total
    assert module.model_spec.padding_free, "the stage itself is as it was"


def test_few_bits_are_counted_as_few(spec):
    lora = replace(spec, lora=LoraSpec())
    whole = simulation(SFTModule(lora)).train(1).parts
    few = simulation(SFTModule(replace(lora, quantization=QuantizationSpec(bits=4)))).train(1).parts
    linear = whole["weights"] - few["weights"]
    assert linear > 0
    assert few["weights in few bits"] == pytest.approx(linear * (4 + 8 / 64 + 32 / (64 * 256)) / 32, rel=0.01)


# ---- sizes and proposals ---------------------------------------------------------------------------------------------


def test_the_copy_that_rollouts_are_sampled_from_ahead_is_counted(spec):
    """All of what is trained: everything, or an adapter."""
    for lora in (None, LoraSpec()):
        ahead, together = (
            simulation(
                GRPOModule(
                    replace(spec, lora=lora),
                    [WeightedReward(LengthReward(target=4))],
                    generation=GenerationSpec(max_new_tokens=6, num_samples=2, keep_logprobs=True),
                    updates=UpdateSpec(async_rollouts=on),
                    correction=SamplerCorrection(),
                )
            )
            for on in (True, False)
        )
        buffers = sum(x.numel() * x.element_size() for x in ahead.module.policy.buffers())
        for phase in ("train", "measure", "generate"):
            more = getattr(ahead, phase)(2).total - getattr(together, phase)(2).total
            assert more == ahead.gradient_bytes + buffers
        assert [note for note in ahead.notes if note not in together.notes] == [
            "answers are sampled while the policy is trained: on one device what generate holds beside weights and "
            "optimiser comes on top of train"
        ]


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("79.2 gib", int(79.2 * 2**30)), ("512M", 512e6)]
)
def test_amounts_of_memory(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["lots", "", "-4GB", "0GB", "12", "80 apples"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UserError, match=r"--memory .* give one like 80GB, 24GiB or 512MB"):
        bytes_of(text)


@pytest.mark.parametrize("budget", [0, 99, 100, 107, 108, 1234, 10**9])
def test_the_largest_that_fits_is_exact(budget):
    asked = []

    def size(n):  # a line with a kink, as where logits are no longer kept
        asked.append(n)
        return 100 + 8 * (n - 1) + 5 * max(n - 37, 0)

    found = largest_that_fits(size, budget, most=5000)
    assert len(asked) < 25
    assert found == max((n for n in range(1, 5001) if size(n) <= budget), default=0)


@pytest.fixture
def data(write_jsonl):
    return RLHFDataModule(train=write_jsonl("text.jsonl", [{"text": "the film was good " * 3}] * 8), batch_size=8)


def test_a_plan_that_fits_changes_nothing(spec, data):
    plan = make_plan(SFTModule(spec), data, Run(), memory=10**9)
    assert plan.fits
    assert plan.proposal == {
        "model.policy.gradient_checkpointing": False,
        "data.batch_size": 8,
        "trainer.accumulate_grad_batches": 1,
    }
    assert plan.lengths.row == 14  # twelve words, one token in front, one behind
    assert plan.largest["train with gradient checkpointing"] > plan.largest["train"] > 8
    assert json.loads(json.dumps(plan.as_dict()))["fits"] is True
    assert "The run fits" in report(plan)


def test_a_plan_that_does_not_fit_keeps_the_step(spec, data):
    module = SFTModule(spec)
    plan = make_plan(module, data, Run(), memory=simulation(module).train(6).total)
    assert not plan.fits
    assert plan.proposal is not None
    size, pieces = plan.proposal["data.batch_size"], plan.proposal["trainer.accumulate_grad_batches"]
    assert size < 8 <= size * pieces
    on = plan.proposal["model.policy.gradient_checkpointing"]
    assert size <= plan.largest["train with gradient checkpointing" if on else "train"]
    assert "does not fit" in report(plan)


def test_nothing_fits(spec, data):
    plan = make_plan(SFTModule(spec), data, Run(), memory=10**4)
    assert plan.proposal is None
    assert does_not_fit(plan).startswith("nothing fits in 0.0 MB (90% of 0.0 MB): without any batch weights,")
    assert "Set lora or dtype: bfloat16 of the model" in does_not_fit(plan)


def test_an_on_policy_stage_is_told_its_own_options(spec, write_jsonl):
    prompts = RLHFDataModule(train=write_jsonl("prompts.jsonl", [{"prompt": "the film was"}] * 64), batch_size=64)
    module = stages(spec)["grpo"]
    plan = make_plan(module, prompts, Run(device="cuda"), memory=10**9, search=False)
    assert [phase.name for phase in plan.phases] == ["generate", "measure", "train"]
    assert [phase.at_once for phase in plan.phases] == [128, 128, 128]
    tight = make_plan(module, prompts, Run(device="cuda"), memory=int(plan.phases[1].peak.total))
    assert tight.proposal is not None
    assert tight.proposal["model.rows_at_once"] < 128
    assert tight.proposal["trainer.accumulate_grad_batches"] > 1
    assert "data.batch_size" not in tight.proposal


def test_sizes(spec):
    lengths = Lengths(10, 0, 2, "")
    module = DPOModule(spec)
    budget = RLHFDataModule(train="x", batch_size=8, tokens_per_batch=100)
    assert sizes_of(module, budget, Run(accumulate=3), lengths).train == 5
    assert sizes_of(module, RLHFDataModule(train="x", batch_size=8), Run(accumulate=3), lengths).step == 24


def test_lengths_need_data_or_a_number(spec):
    module = SFTModule(spec)
    with pytest.raises(UserError, match=r"set data.train, or give --length N"):
        lengths_of(module, RLHFDataModule(), None)
    assert lengths_of(module, RLHFDataModule(), 77).row == 77
    with pytest.raises(UserError, match=r"--length 6 is the length of a whole row: .* more than the 6 of generation"):
        lengths_of(stages(spec)["grpo"], RLHFDataModule(), 6)


def test_an_optimiser_that_cannot_be_followed(spec):
    class Looks(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                float(group["params"][0].sum())

    with pytest.raises(UserError, match=r"plan cannot follow the optimiser Looks .*torch.optim.AdamW in its place"):
        simulation(SFTModule(spec, optimizer=lambda params: Looks(params, lr=0.1)))


def test_a_stage_that_asks_for_numbers(spec):
    class Looks(SFTModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float(batch.mask.sum())

    with pytest.raises(UserError, match="plan runs Looks on tensors without numbers, and its training step asks for"):
        simulation(Looks(spec)).train(1)
