"""What is run with the vocabulary cut over a group of processes: cases by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from judged_fits import judged
from one_step import another
from parallel_fits import EVALUATED, SPECS, Case, compared, evaluated, fit, outcome, resumed, sampling_ppo

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_guarded import TDPO
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.parallel import FSDP2Strategy
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import DPOModule, PPOModule, SFTModule


def cut_vocabulary() -> FSDP2Strategy:
    return FSDP2Strategy(tensor_parallel_size=2)


def by_groups(world: int) -> Any:
    return cut_vocabulary() if world > 1 else "auto"


def in_half() -> FSDP2Strategy:
    return FSDP2Strategy(tensor_parallel_size=2, param_dtype="bfloat16", reduce_dtype="float32")


def sampled_in_half(model: str, folder: Path, world: int) -> dict[str, Any]:
    module = sampling_ppo(model)
    return outcome(module, fit(module, "ppo", folder, devices=world, strategy=cut_vocabulary(), precision="bf16-mixed"))


def dpo_without_exact_kl(model: str, folder: Path, world: int) -> dict[str, Any]:
    """DPO against a reference with other weights, both heads in parts."""
    module = DPOModule(
        ModelSpec(path=model),
        DPO(beta=0.5, label_smoothing=0.1, margin="offset"),
        reference=another(model),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )
    return outcome(module, fit(module, "dpo", folder, devices=world, strategy=by_groups(world)))


def sampled(model: str, folder: Path, world: int) -> dict[str, Any]:
    """Answers that a group samples together, with the seeds of one process."""
    module = sampling_ppo(model)
    found = outcome(module, fit(module, "ppo", folder, devices=world, strategy=by_groups(world)))
    if world > 1:
        head = module.policy.causal_lm.get_output_embeddings()
        found["held"] = [head.weight.to_local().shape[0], head.weight.shape[0]]
    return found


def exported_in_parts(model: str, folder: Path, world: int) -> dict[str, Any]:
    module = sampling_ppo(model)
    fit(module, "ppo", folder, max_epochs=1, devices=world, strategy=cut_vocabulary())
    module.export(folder / "hf of parts")
    return outcome(module, [])


def refused(model: str, folder: Path, world: int) -> dict[str, Any]:
    """What is said of all that does not go together with a vocabulary in parts."""
    path = ModelSpec(path=model)
    tied = replace(another(model), config={**(another(model).config or {}), "tie_word_embeddings": True})
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "tie_word_embeddings": False}
    made = [
        SFTModule(tied),
        SFTModule(replace(path, logprobs="fused")),
        SFTModule(replace(path, lora=LoraSpec(r=2, dropout=0.1))),
        SFTModule(ModelSpec(config=gpt2, tokenizer=model)),
        DPOModule(path, TDPO(beta=0.5)),
        PPOModule(path, [WeightedReward(LengthReward())], generation=GenerationSpec(max_new_tokens=3, top_k=5)),
        SFTModule(path),
    ]
    said = []
    for module in made:
        stage = {DPOModule: "dpo", PPOModule: "ppo"}.get(type(module), "sft")
        size = 3 if module is made[-1] else 2
        try:
            fit(module, stage, folder, devices=world, strategy=FSDP2Strategy(tensor_parallel_size=size))
        except UserError as error:
            said.append(str(error))
    return {"said": said}


IN_PARTS: dict[str, Case] = {
    f"{stage}, {name}": compared(stage, cut_vocabulary)
    for name, stages in (
        ("tensor parallel", ("sft", "reward", "ppo", "grpo", "kto")),
        ("tensor parallel, two groups", ("sft", "reward", "ppo")),
    )
    for stage in stages
}

IN_PARTS |= {
    "dpo, tensor parallel": dpo_without_exact_kl,
    "sft, tensor parallel, lora": compared("sft", cut_vocabulary, spec=SPECS["lora"]),
    "sft, tensor parallel, bf16-mixed": compared("sft", cut_vocabulary, precision="bf16-mixed"),
    "sft, tensor parallel, bfloat16": compared("sft", in_half),
    "ppo, tensor parallel, sampled": sampled,
    "ppo, tensor parallel, sampled in half": sampled_in_half,
    "ppo, tensor parallel, resumed": resumed("ppo", cut_vocabulary),
    "ppo, tensor parallel, exported": exported_in_parts,
    "ppo, tensor parallel, judged": judged(by_groups),
    "sft, tensor parallel, refused": refused,
    **{f"{stage}, tensor parallel, evaluated": evaluated(stage, by_groups) for stage in EVALUATED},
}
