"""Five steps of every stage under any strategy, and the weights gathered at the end.

Run as a script by each of several processes: parallel_fits.py CASES MODEL FOLDER, with LOCAL_RANK and its kin in the
environment. CASES are names of cases below, with ; between; the first process writes what each gives to FOLDER/CASE.pt.
"""

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from one_step import another, module_for, records
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from rlhf_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO
from rlhf_lightning.callbacks.hf_export import export
from rlhf_lightning.callbacks.sample_logger import SampleLogger
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_guarded import TDPO
from rlhf_lightning.losses.preference_online import NashMD
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.sharded import whole_state_dict
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.parallel import FSDP2Strategy
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.generate import GenerationSpec
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.replay import ReplaySpec
from rlhf_lightning.stages import DPOModule, GRPOModule, OnlineDPOModule, PPOModule, SFTModule
from rlhf_lightning.stages.critic import CriticSpec
from rlhf_lightning.stages.grpo import DynamicSampling
from rlhf_lightning.stages.online_dpo import Opponent

STAGES = ("sft", "reward", "dpo", "ppo", "grpo")
EVALUATED = ("sft", "reward", "ppo")
STEPS = 5
LOSSES = ("train/loss", "policy/loss", "value/loss")


class Losses(L.Callback):
    """The losses of every optimiser step, added."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if self._step < trainer.global_step:
            self._step = trainer.global_step
            seen = trainer.callback_metrics
            self.values.append(sum(float(seen[name]) for name in LOSSES if name in seen))


def trainer_for(folder: Path, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": STEPS, "gradient_clip_val": 0.5}
    return L.Trainer(
        **{**defaults, "enable_checkpointing": False, "accumulate_grad_batches": 3, **options},
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=list(callbacks),
    )


def fit(
    module: L.LightningModule,
    stage: str,
    folder: Path,
    *,
    ckpt_path: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    batch_size: int | None = None,
    validated: bool = False,
    **options: Any,
) -> list[float]:
    """Train on the twelve records of `stage`; the losses. A step is an epoch: the same, however many share it.

    Args:
        validated: on the same records, after every epoch.
    """
    together = batch_size or (12 if stage in ("ppo", "grpo") else 4)
    losses = Losses()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(folder, [losses, *callbacks], **options)
        readers = options.get("devices", 1) // getattr(options.get("strategy"), "tensor_parallel_size", 1)
        records_of = str(folder / f"{stage}.jsonl")
        size = together // max(readers, 1)
        data = RLHFDataModule(train=records_of, val=records_of if validated else None, batch_size=size)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return losses.values


def outcome(module: L.LightningModule, losses: list[float]) -> dict[str, Any]:
    """Losses, and the weights of every trained model, whole."""
    weights: dict[str, Tensor] = {}
    for name in ("policy", "model", "critic"):
        if isinstance(model := getattr(module, name, None), nn.Module):
            weights |= {f"{name}.{key}": value for key, value in whole_state_dict(model).items()}
    return {"losses": losses, "weights": weights}


def of_stage(stage: str, model: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Five steps; `spec` are options of the model."""
    module = module_for(stage, model, **options.pop("spec", {}))
    return outcome(module, fit(module, stage, folder, **options))


def write_records(folder: Path) -> None:
    for stage in (*STAGES, "kto"):
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(stage)))


def in_processes(cases: Sequence[str], model: str, folder: Path, *, count: int = 2, timeout: float = 240) -> None:
    """Run cases in `count` processes; an error, with what they said, if one of them fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    environment |= {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), ";".join(cases), model, str(folder)]
    outputs = [folder / f"rank{rank}.txt" for rank in range(count)]
    running = []
    for rank, output in enumerate(outputs):
        with output.open("w") as said:
            own = environment | {"LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen(command, env=own, stdout=said, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * count, "\n".join(output.read_text()[-3000:] for output in outputs)


# --- cases: model, folder and number of processes -> what is compared

Case = Callable[[str, Path, int], dict[str, Any]]


class Evaluated(L.Callback):
    """What every validation logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen = trainer.callback_metrics
        self.rows.append({name: float(value) for name, value in seen.items() if name.startswith("val/")})


def evaluated(stage: str, strategy: Callable[[int], Any]) -> Case:
    """Two epochs with a validation after each: what it logs, and the rows of `samples.jsonl`."""

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        module = sampling_ppo(model) if stage == "ppo" else module_for(stage, model)
        seen, given = Evaluated(), strategy(world)
        samples = folder / f"{stage} {given if isinstance(given, str) else 'groups'} {world}.samples.jsonl"
        table = SampleLogger(num_prompts=2, max_new_tokens=6, file=samples.name, show=False)
        options = {"devices": world, "strategy": given, "num_sanity_val_steps": 0}
        fit(module, stage, folder, max_epochs=2, callbacks=[seen, table], validated=True, **options)
        rows = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
        return {"evaluated": seen.rows, "samples": rows}

    return case


def assert_evaluated_alike(found: dict[str, Any], expected: dict[str, Any], *, samples: bool = True) -> None:
    """What `evaluated` gave twice: metrics to 1e-5, samples to the letter."""
    assert len(expected["evaluated"]) == 2
    assert [row.keys() for row in found["evaluated"]] == [row.keys() for row in expected["evaluated"]]
    for ours, theirs in zip(found["evaluated"], expected["evaluated"], strict=True):
        assert ours, "nothing was logged"
        for name, value in theirs.items():
            assert abs(ours[name] - value) <= 1e-5 * max(1.0, abs(value)), name
    if samples:
        assert found["samples"] == expected["samples"]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def compared(stage: str, strategy: Callable[[], Any], **options: Any) -> Case:
    """Five steps of a stage, to be compared with one process."""

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        return of_stage(stage, model, folder, devices=world, strategy=strategy(), **options)

    return case


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


def shared_critic(model: str, folder: Path, world: int) -> dict[str, Any]:
    """A value head, a unit of its own, on the policy's hidden states."""
    module = module_for("ppo", model)
    module.critic_spec = CriticSpec(kind="shared")
    return outcome(module, fit(module, "ppo", folder, devices=world, strategy="fsdp2" if world > 1 else "auto"))


def following_reference(model: str, folder: Path, world: int) -> dict[str, Any]:
    """A reference that moves with the policy, both sharded."""
    module = module_for("dpo", model)
    module.reference_sync = ReferenceSync(every=2, share=0.6)
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


def sampling_ppo(model: str) -> PPOModule:
    """PPO on answers that it samples itself, one by one: ranks take different numbers of steps to sample theirs."""
    return PPOModule(
        ModelSpec(path=model),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=12, rows_at_once=1),
        updates=UpdateSpec(inner_epochs=2, num_minibatches=1),
        rows_at_once=4,
        optimizer=adamw,
        seed=3,
    )


class CountGathers(L.Callback):
    """How many all-gathers each call of `generate` makes."""

    def __init__(self) -> None:
        self.gathers: list[int] = []
        self.lengths: list[list[int]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        own, gather = module.engine.generate, _fsdp_param_group.foreach_all_gather

        def generate(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(_fsdp_param_group, "foreach_all_gather", wraps=gather) as seen:
                answers = own(*args, **kwargs)
            self.gathers.append(seen.call_count)
            self.lengths.append(answers.mask.sum(-1).tolist())
            return answers

        module.engine.generate = generate


def generation(model: str, folder: Path, world: int) -> dict[str, Any]:
    """All-gathers while answers are sampled, how many units there are, and the answers' lengths on every rank."""
    module, count = sampling_ppo(model), CountGathers()
    fit(module, "ppo", folder, devices=world, strategy="fsdp2", max_epochs=2, callbacks=[count])
    lengths: list[Any] = [None] * world
    torch.distributed.all_gather_object(lengths, count.lengths)
    units = sum(isinstance(part, FSDPModule) for part in module.policy.modules())
    return {"lengths": lengths, "gathers": count.gathers, "units": units}


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


class Watch(L.Callback):
    """What a run looks like from inside."""

    def __init__(self) -> None:
        self.here = self.everywhere = 0
        """Elements of frozen models."""
        self.in_checkpoint: list[str] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for parameter in (p for model in module.frozen_models() for p in model.parameters()):
            self.here += parameter.to_local().numel()
            self.everywhere += parameter.numel()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.in_checkpoint = sorted(checkpoint["state_dict"])


DRAWS: dict[str, dict[str, Any]] = {
    "draws again": {"dynamic_sampling": DynamicSampling(max_batches=3)},
    "replays": {"replay": ReplaySpec(capacity=8)},
}


def drawing_grpo(model: str, draws: str) -> GRPOModule:
    """GRPO on pairs of answers that it samples itself, many of one length and so without a difference."""
    return GRPOModule(
        ModelSpec(path=model),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=4, num_samples=2),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        seed=3,
        **DRAWS[draws],
    )


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


def resumed(stage: str, strategy: Callable[[], Any] = lambda: "fsdp2") -> Case:
    """A run of four epochs, and one that is stopped after the second and goes on from its checkpoint."""

    def made(model: str) -> L.LightningModule:
        if stage == "grpo":
            return drawing_grpo(model, "replays")
        if stage == "dpo":
            return DPOModule(ModelSpec(path=model), reference_sync=ReferenceSync(every=1, share=0.5), optimizer=adamw)
        return sampling_ppo(model) if stage == "ppo" else SFTModule(ModelSpec(path=model), optimizer=adamw)

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        def given() -> dict[str, Any]:
            return {"devices": world, "strategy": strategy()}

        whole, first, second, watch = made(model), made(model), made(model), Watch()
        losses = fit(whole, stage, folder, max_epochs=4, **given())
        keep = ModelCheckpoint(dirpath=folder / f"{stage} half", filename="half", enable_version_counter=False)
        fit(first, stage, folder, max_epochs=2, callbacks=[keep, watch], enable_checkpointing=True, **given())
        path = folder / f"{stage} half" / "half.ckpt"
        rest = fit(second, stage, folder, max_epochs=4, ckpt_path=path, **given())
        return {
            "whole": outcome(whole, losses),
            "resumed": outcome(second, losses[: len(losses) - len(rest)] + rest),
            "in_checkpoint": watch.in_checkpoint,
            "frozen_share": watch.here / max(watch.everywhere, 1),
        }

    return case


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


SPECS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraSpec(r=2)},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "without padding": {"padding_free": True},
    "offload": {"activation_offload": True, "gradient_checkpointing": True},
}
CASES: dict[str, Case] = {
    f"{stage}, {name}": compared(stage, named(name)) for stage in STAGES for name in ("fsdp2", "ddp")
}
CASES |= {
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
CASES |= {
    f"{stage}, {name}": compared(stage, cut_vocabulary)
    for name, stages in (
        ("tensor parallel", ("sft", "reward", "ppo", "grpo", "kto")),
        ("tensor parallel, two groups", ("sft", "reward", "ppo")),
    )
    for stage in stages
}
CASES |= {
    "dpo, tensor parallel": dpo_without_exact_kl,
    "sft, tensor parallel, lora": compared("sft", cut_vocabulary, spec=SPECS["lora"]),
    "sft, tensor parallel, bf16-mixed": compared("sft", cut_vocabulary, precision="bf16-mixed"),
    "sft, tensor parallel, bfloat16": compared("sft", in_half),
    "ppo, tensor parallel, sampled": sampled,
    "ppo, tensor parallel, sampled in half": sampled_in_half,
    "ppo, tensor parallel, resumed": resumed("ppo", cut_vocabulary),
    "ppo, tensor parallel, exported": exported_in_parts,
    "sft, tensor parallel, refused": refused,
    **{f"{stage}, tensor parallel, evaluated": evaluated(stage, by_groups) for stage in EVALUATED},
    **{f"{stage}, evaluated, fsdp2": evaluated(stage, lambda _: "fsdp2") for stage in EVALUATED},
    **{f"{stage}, evaluated, ddp": evaluated(stage, lambda _: "ddp") for stage in EVALUATED if stage != "reward"},
}
CASES |= {
    "kto, fsdp2": compared("kto", named("fsdp2")),
    "sft, not resharded": compared("sft", lambda: FSDP2Strategy(reshard_after_forward=False)),
    "sft, bfloat16": compared("sft", lambda: FSDP2Strategy(param_dtype="bfloat16", reduce_dtype="float32")),
    "sft, bf16-mixed": compared("sft", named("fsdp2"), precision="bf16-mixed"),
    **{f"{stage}, short of memory": short_of_memory(stage) for stage in ("sft", "dpo", "ppo")},
    "sft, asked in between": asked_in_between,
    "sft, tied": tied,
    "sft, replicas": compared("sft", lambda: FSDP2Strategy(num_replicas=2)),
    "ppo, replicas": compared("ppo", lambda: FSDP2Strategy(num_replicas=2)),
    "ppo, shared critic": shared_critic,
    "dpo, following reference": following_reference,
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
    "sft, foreign checkpoint": foreign_checkpoint,
    "ppo, exported": exported,
    "sft, loose parameter": loose_parameter,
}


def main() -> None:
    names, model, folder = sys.argv[1:]
    world = int(os.environ["WORLD_SIZE"])  # Lightning takes it away after a fit
    for name in names.split(";"):
        result = CASES[name](model, Path(folder), world)
        if os.environ["LOCAL_RANK"] == "0":
            torch.save(result, Path(folder) / f"{name}.pt")


if __name__ == "__main__":
    main()
