"""What is run under `fsdp2`, and under `ddp` beside it: cases by name."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from judged_fits import judged
from lightning.pytorch.callbacks import ModelCheckpoint
from one_step import another, module_for
from parallel_fits import (
    EVALUATED,
    SPECS,
    STAGES,
    Case,
    adamw,
    compared,
    drawing_grpo,
    evaluated,
    fit,
    of_stage,
    outcome,
    resumed,
    sampling_ppo,
    trainer_for,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from rlhf_lightning.callbacks.hf_export import export
from rlhf_lightning.callbacks.nan_guard import NaNGuard
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.preference_online import NashMD
from rlhf_lightning.models import loading
from rlhf_lightning.models.compiled import compile_layers
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import BEMA, ReferenceSync
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.parallel import FSDP2Strategy
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import OnlineDPOModule, SFTModule
from rlhf_lightning.stages.critic import CriticSpec
from rlhf_lightning.stages.online_dpo import Opponent


def short_of_memory(stage: str) -> Case:
    """The same, where the first process has no room for more than one sequence (two of a pair) with a gradient."""

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        own, sizes = Policy.hidden_states, []
        room = 2 if stage == "dpo" else 1

        def run(policy: Policy, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
            learns = torch.is_grad_enabled() and any(p.requires_grad for p in policy.parameters())
            if not learns or os.environ["LOCAL_RANK"] != "0":
                return own(policy, tokens, *args, **options)
            sizes.append(len(tokens))
            if len(tokens) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return own(policy, tokens, *args, **options)

        with mock.patch.object(Policy, "hidden_states", run):
            return of_stage(stage, model, folder, devices=world, strategy="ddp") | {"sizes": sizes}

    return case


def compiled(model: str, folder: Path, world: int) -> dict[str, Any]:
    """Layers compiled one by one, as far as to graphs; and how many there were."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with mock.patch.object(loading, "compile_layers", partial(compile_layers, backend=backend)):
        found = of_stage("sft", model, folder, devices=world, strategy="fsdp2", spec={"compile": "layers"})
    return found | {"graphs": len(graphs)}


def shared_critic(model: str, folder: Path, world: int) -> dict[str, Any]:
    """A value head, a unit of its own, on the policy's hidden states."""
    module = module_for("ppo", model)
    module.critic_spec = CriticSpec(kind="shared")
    return outcome(module, fit(module, "ppo", folder, devices=world, strategy="fsdp2" if world > 1 else "auto"))


def following_reference(model: str, folder: Path, world: int) -> dict[str, Any]:
    """A reference that moves with the policy, both sharded."""
    module = module_for("dpo", model)
    module.reference_sync = ReferenceSync(every=2, bema=BEMA(every=1, lag=2.0))
    return outcome(module, fit(module, "dpo", folder, devices=world, strategy="fsdp2" if world > 1 else "auto"))


def tied(model: str, folder: Path, world: int) -> dict[str, Any]:
    """An output head that is the input embedding."""
    shape = another(model)
    spec = replace(shape, config={**(shape.config or {}), "tie_word_embeddings": True})
    module = SFTModule(spec, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    found = outcome(module, fit(module, "sft", folder, devices=world, strategy="fsdp2" if world > 1 else "auto"))
    export_policy(module.policy, module.tokenizer, folder / f"tied {world}")
    return found


class AskInBetween(L.Callback):
    """Runs the model after the backward pass and before the optimiser: what it gathers is stale after the step."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        tokens = torch.tensor([[1, 5, 6]])
        with torch.no_grad():
            module.policy.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(3)[None])


def asked_in_between(model: str, folder: Path, world: int) -> dict[str, Any]:
    return of_stage("sft", model, folder, devices=world, strategy="fsdp2", callbacks=[AskInBetween()])


class CountGathers(L.Callback):
    """How many all-gathers each call of `generate` makes, by the function that makes them, and the answers' lengths."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.gathers: list[int] = []
        self.lengths: list[list[int]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        own, gather = module.engine.generate, getattr(self.owner, self.name)

        def generate(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(self.owner, self.name, wraps=gather) as seen:
                answers = own(*args, **kwargs)
            self.gathers.append(seen.call_count)
            self.lengths.append(answers.mask.sum(-1).tolist())
            return answers

        module.engine.generate = generate


def sampled(model: str, folder: Path, world: int, strategy: Any, owner: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """The module of a PPO of two rollouts; all-gathers while answers are sampled, and their lengths on every rank."""
    module, count = sampling_ppo(model), CountGathers(owner, name)
    fit(module, "ppo", folder, devices=world, strategy=strategy, max_epochs=2, callbacks=[count])
    lengths: list[Any] = [None] * world
    torch.distributed.all_gather_object(lengths, count.lengths)
    return module, {"lengths": lengths, "gathers": count.gathers}


def generation(model: str, folder: Path, world: int) -> dict[str, Any]:
    """What `sampled` counts, and how many units there are."""
    module, found = sampled(model, folder, world, "fsdp2", _fsdp_param_group, "foreach_all_gather")
    return {**found, "units": sum(isinstance(part, FSDPModule) for part in module.policy.modules())}


def mixture(model: str, folder: Path, world: int) -> dict[str, Any]:
    """Answers drawn from policy and reference at once, both sharded."""
    module = OnlineDPOModule(
        ModelSpec(path=model),
        [WeightedReward(LengthReward(target=3))],
        loss=NashMD(),
        opponent=Opponent(reference_share=0.5),
        generation=GenerationSpec(max_new_tokens=6, num_samples=2),
        optimizer=adamw,
        seed=3,
    )
    return outcome(module, fit(module, "ppo", folder, devices=world, strategy="fsdp2", max_epochs=2))


class Logged(L.Callback):
    """What every optimiser step logged of how its answers were come by."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        seen = trainer.callback_metrics
        self.rows.append({k: float(v) for k, v in seen.items() if k.startswith(("sampling/", "groups/"))})


def drawing(draws: str, strategy: str) -> Case:
    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        module, logged = drawing_grpo(model, draws), Logged()
        options = {"devices": world, "strategy": strategy, "max_epochs": 2, "accumulate_grad_batches": 1}
        losses = fit(module, "grpo", folder, batch_size=4, callbacks=[logged], **options)
        return {**outcome(module, losses), "logged": logged.rows}

    return case


def foreign_checkpoint(model: str, folder: Path, world: int) -> dict[str, Any]:
    """What is said when a checkpoint of `ddp` is resumed, a folder that is none, and one in shards."""
    shards = folder / "foreign" / "shards"
    if os.environ["LOCAL_RANK"] == "0":
        dcp.save({"weight": torch.zeros(2)}, checkpoint_id=shards, no_dist=True)
    keep = ModelCheckpoint(dirpath=folder / "foreign", filename="foreign", enable_version_counter=False)
    first = SFTModule(ModelSpec(path=model), optimizer=adamw)
    fit(first, "sft", folder, max_epochs=1, callbacks=[keep], enable_checkpointing=True, devices=world, strategy="ddp")
    said = []
    for path in (folder / "foreign" / "foreign.ckpt", folder / "foreign", shards):
        second = SFTModule(ModelSpec(path=model), optimizer=adamw)
        try:
            fit(second, "sft", folder, max_epochs=2, ckpt_path=path, devices=world, strategy="fsdp2")
        except UserError as error:
            said.append(str(error))
    return {"said": said}


class Poison(L.Callback):
    """A NaN in the gradients of two steps: in the value head's only row, and where the last process has a share."""

    def __init__(self) -> None:
        self.shares: list[int] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        parts = {1: module.critic.head.weight, 3: module.policy.model.lm_head.weight}
        if trainer.global_step not in parts:
            return
        gradient = parts[trainer.global_step].grad
        if gradient is None:  # FSDP1, of a process that has no share
            self.shares.append(0)
            return
        here = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        self.shares.append(here.numel())
        if trainer.global_step == 1 or trainer.global_rank == trainer.world_size - 1:
            here.fill_(math.nan)


def poisoned(model: str, folder: Path, world: int) -> dict[str, Any]:
    """PPO of which two steps are refused; and how much of the two parameters each process holds."""
    module, poison, strategy = module_for("ppo", model), Poison(), "fsdp2" if world > 1 else "auto"
    losses = fit(module, "ppo", folder, devices=world, strategy=strategy, callbacks=[poison, NaNGuard()])
    shares: list[Any] = [poison.shares]
    if world > 1:
        shares = [None] * world
        torch.distributed.all_gather_object(shares, poison.shares)
    return outcome(module, losses) | {"shares": shares}


def exported(model: str, folder: Path, world: int) -> dict[str, Any]:
    """Hugging Face folders of policy and critic, and the weights that they were written from."""
    module = sampling_ppo(model)
    trainer = trainer_for(folder, max_epochs=1, devices=world, strategy="fsdp2")
    trainer.fit(module, datamodule=RLHFDataModule(train=str(folder / "ppo.jsonl"), batch_size=12 // world))
    export(trainer, module, folder / "hf")
    return outcome(module, [])


def loose_parameter(model: str, folder: Path, world: int) -> dict[str, Any]:
    """What is said of a parameter outside every unit, and of groups that do not divide the processes."""
    said = []
    module = SFTModule(ModelSpec(path=model))
    module.temperature = nn.Parameter(torch.ones(()))
    for what, strategy in (
        (module, FSDP2Strategy()),
        (SFTModule(ModelSpec(path=model)), FSDP2Strategy(num_replicas=3)),
    ):
        try:
            fit(what, "sft", folder, devices=world, strategy=strategy)
        except UserError as error:
            said.append(str(error))
    return {"said": said}


def named(strategy: str) -> Callable[[], str]:
    return lambda: strategy


SHARDED: dict[str, Case] = {
    f"{stage}, {name}": compared(stage, named(name)) for stage in STAGES for name in ("fsdp2", "ddp")
}

SHARDED |= {
    f"{stage}, {name}": compared(stage, named("fsdp2"), spec=SPECS[name])
    for stage, name in (
        ("sft", "lora"),
        ("dpo", "lora"),
        ("grpo", "lora"),
        ("sft", "gradient checkpointing"),
        ("reward", "without padding"),
        ("ppo", "without padding"),
        ("sft", "offload"),
    )
}

SHARDED |= {
    "kto, fsdp2": compared("kto", named("fsdp2")),
    "taught, fsdp2": compared("taught", named("fsdp2")),
    "gkd, fsdp2": compared("gkd", named("fsdp2")),
    "sft, not resharded": compared("sft", lambda: FSDP2Strategy(reshard_after_forward=False)),
    "sft, bfloat16": compared("sft", lambda: FSDP2Strategy(param_dtype="bfloat16", reduce_dtype="float32")),
    "sft, bf16-mixed": compared("sft", named("fsdp2"), precision="bf16-mixed"),
    **{f"{stage}, short of memory": short_of_memory(stage) for stage in ("sft", "dpo", "ppo")},
    "sft, asked in between": asked_in_between,
    "sft, compiled": compiled,
    "sft, tied": tied,
    "sft, replicas": compared("sft", lambda: FSDP2Strategy(num_replicas=2)),
    "ppo, replicas": compared("ppo", lambda: FSDP2Strategy(num_replicas=2)),
    "ppo, shared critic": shared_critic,
    "dpo, following reference": following_reference,
    "ppo, poisoned": poisoned,
    "ppo, generation": generation,
    "online dpo, mixture": mixture,
    "sft, resumed": resumed("sft"),
    "dpo, resumed": resumed("dpo"),
    "ppo, resumed": resumed("ppo"),
    "grpo, resumed": resumed("grpo"),
    **{
        f"grpo, {draws}, {strategy}": drawing(draws, strategy)
        for draws in ("draws again", "replays")
        for strategy in ("fsdp2", "ddp")
    },
    **{f"ppo, judged, {strategy}": judged(lambda _, name=strategy: name) for strategy in ("fsdp2", "ddp")},
    "sft, foreign checkpoint": foreign_checkpoint,
    "ppo, exported": exported,
    "sft, loose parameter": loose_parameter,
    **{f"{stage}, evaluated, fsdp2": evaluated(stage, lambda _: "fsdp2") for stage in EVALUATED},
    **{f"{stage}, evaluated, ddp": evaluated(stage, lambda _: "ddp") for stage in EVALUATED if stage != "reward"},
}
