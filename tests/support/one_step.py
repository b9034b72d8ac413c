"""One optimiser step of a stage on fixed records, cut in any way: its loss and its gradients.

Run as a script it takes the same step in two processes: one_step.py STAGE MODEL RECORDS OUT [STRATEGY]
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_lightning.advantages import FixedKL, GroupNormalised
from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.distillation import Distillation
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_batch import BetaDPO
from rlhf_lightning.losses.preference_free import ChosenNLL
from rlhf_lightning.losses.preference_guarded import TDPO
from rlhf_lightning.losses.preference_length import LDDPO
from rlhf_lightning.losses.preference_mixed import TPO, WPO, WeightedLoss, WeightedLosses
from rlhf_lightning.losses.preference_ranked import ListwiseDPO
from rlhf_lightning.losses.reward_model import BradleyTerry, StepCorrectness
from rlhf_lightning.losses.unpaired import BCO, KTO
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.answers import assemble
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
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping
from rlhf_lightning.stages.router_balance import RouterBalance

WORDS = ("the", "film", "was", "good", "bad", "long", "short", "great", "dull", "and", "but", "very", "not", "a")

UNPAIRED = {
    "kto": KTO(desirable_weight=1.0, undesirable_weight=1.5),
    "kto, cached": KTO(beta=0.5),
    "bco": BCO(beta=0.5),
}
DPO_WITH_OFFSET = DPO(beta=0.5, label_smoothing=0.1, margin="offset")
TAUGHT = Distillation("jsd", beta=0.3, temperature=1.5, nll_coef=0.5)
PREFERENCES = {
    # everything that a loss can read: margins, chosen tokens, an exact KL, sum of squares, means over the step
    "dpo": WeightedLosses(
        [
            WeightedLoss(DPO_WITH_OFFSET),
            WeightedLoss(ChosenNLL(), 0.5),
            WeightedLoss(TDPO(beta=0.5, version=1)),
            WeightedLoss(WPO(LDDPO(alpha=0.3, loss=DPO(beta=1.0))), 20.0),
            WeightedLoss(BetaDPO(beta=0.5)),
        ]
    ),
    "dpo, cached": DPO_WITH_OFFSET,
    "dpo, drawn pairs": BetaDPO(beta=0.5, keep_frac=0.5),
    "dpo, ranked": ListwiseDPO(beta=0.5),
    "dpo, triples": TPO(DPO(beta=0.5), nll_coef=0.5),
}


def words(count: int, start: int) -> str:
    return " ".join(WORDS[(start * 5 + 3 * i) % len(WORDS)] for i in range(count))


def records(stage: str) -> list[dict[str, Any]]:
    """Twelve records of uneven lengths."""
    lengths = [1, 9, 2, 7, 3, 3, 8, 1, 6, 4, 5, 2]
    made = []
    for i, n in enumerate(lengths):
        prompt = words(1 + i % 4, i)
        if stage in ("sft", "taught"):
            made.append({"prompt": prompt, "completion": words(n, i + 1)})
        elif stage == "dpo, ranked":
            answers = [words(n, i + k) + " film" * k for k in range(2 + i % 3)]
            made.append({"prompt": prompt, "completions": answers, "ranks": [3, 1, 2, 2][: len(answers)]})
        elif stage == "reward, steps":
            steps = [words(1 + (n + k) % 4, i + k) for k in range(1 + n % 3)]
            made.append({"prompt": prompt, "completions": steps, "labels": [0.25, None, True][-len(steps) :]})
        elif stage == "reward" or stage in PREFERENCES:
            made.append(
                {"prompt": prompt, "chosen": words(n, i + 1), "rejected": words(10 - n, i + 2), "margin": 0.1 * i}
            )
            if stage == "dpo, triples":
                made[-1]["gold"] = words(1 + n // 2, i + 3)
        elif stage in UNPAIRED:
            made.append({"prompt": prompt, "completion": words(n, i + 1), "label": i % 3 != 1})
        else:
            made.append({"prompt": prompt, "length": n, "row": i})
    return made


def another(model: str, **other: Any) -> ModelSpec:
    """A model of the same shape (but for `other`) and tokenizer with other weights, which the policy differs from."""
    config = json.loads((Path(model) / "config.json").read_text())
    shape = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape += ("num_key_value_heads", "max_position_embeddings", "initializer_range")
    shape += ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    same = {name: config[name] for name in shape if name in config}
    return ModelSpec(config=same | other, tokenizer=model, seed=7)


class Canned:
    """Answers that are a function of the prompt's record, padded as asked."""

    extra_left = 0
    extra_right = 0
    pads_on_the_right = False
    """All padding behind the answer, none in front of the prompt."""

    def generate(self, prompts: PromptBatch, seed: int) -> Generated:
        copies = self.generation.num_samples
        pad = self.tokenizer.pad_token_id
        left = torch.nn.functional.pad(prompts.tokens, (self.extra_left, 0), value=pad).repeat_interleave(copies, 0)
        mask = torch.nn.functional.pad(prompts.attention_mask, (self.extra_left, 0), value=False)
        asked = [(record, copy) for record in prompts.records for copy in range(copies)]
        lengths = [min(record["length"] + copy, 10) for record, copy in asked]
        longest, device = max(lengths) + self.extra_right, left.device
        answers = torch.stack([torch.arange(longest) * (7 + copy) % 11 + 4 + r["row"] % 3 for r, copy in asked])
        answers, ends = answers.to(device), left.shape[1] + torch.tensor(lengths, device=device)
        made = assemble(torch.cat((left, answers), 1), mask.repeat_interleave(copies, 0), ends, pad_id=pad)
        if not self.pads_on_the_right:
            return made
        in_front = made.attention_mask.int().argmax(-1, keepdim=True)
        order = (torch.arange(made.tokens.shape[1], device=device) + in_front) % made.tokens.shape[1]
        rows = ("tokens", "attention_mask", "mask", "positions")
        return replace(made, **{name: getattr(made, name).gather(1, order) for name in rows})


class CannedPPO(Canned, PPOModule):
    """PPO on canned answers; everything else is real."""


class CannedGKD(Canned, GKDModule):
    """Distillation on canned answers; everything else is real."""


class CannedGRPO(Canned, GRPOModule):
    """GRPO on canned answers; everything else is real."""


class CannedOnlineDPO(Canned, OnlineDPOModule):
    """Online DPO on canned answers; everything else is real."""


class Keep(L.Callback):
    """Keeps the gradients of the first optimiser step, and its metrics."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if not self.gradients:
            self.gradients = {n: whole(p.grad).clone() for n, p in module.named_parameters() if p.grad is not None}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def module_for(stage: str, model: str, **spec: Any) -> L.LightningModule:
    torch.manual_seed(0)
    source = ModelSpec(path=model, **spec)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    if stage == "sft":
        return SFTModule(source, optimizer=sgd)
    if stage == "taught":
        return SFTModule(source, TAUGHT, teacher=another(model, hidden_size=24, vocab_size=32), optimizer=sgd)
    if stage == "reward":
        return RewardModule(source, loss=BradleyTerry(label_smoothing=0.1, centring_coef=0.1), optimizer=sgd, seed=3)
    if stage == "reward, steps":
        return RewardModule(source, StepCorrectness(wrong_weight=2.0), pooling="steps", optimizer=sgd, seed=3)
    if stage in PREFERENCES:
        return DPOModule(source, PREFERENCES[stage], reference=another(model), optimizer=sgd)
    if stage in UNPAIRED:
        return KTOModule(source, UNPAIRED[stage], reference=another(model), optimizer=sgd)
    if stage == "gkd":
        return CannedGKD(
            source,
            another(model, hidden_size=24, vocab_size=32),
            TAUGHT,
            on_policy_frac=0.7,
            generation=GenerationSpec(max_new_tokens=10, num_samples=3),
            optimizer=sgd,
            seed=3,
        )
    if stage == "grpo":
        return CannedGRPO(
            source,
            [WeightedReward(LengthReward(target=4))],
            reference=another(model),
            generation=GenerationSpec(max_new_tokens=10, temperature=0.7, num_samples=3),
            credit=GroupNormalised(std_over="batch"),
            kl=KLSpec(control=FixedKL(0.02), credited="to_come", bound=10.0, loss_coef=0.3, loss_estimator="k3"),
            clip_advantages=1.0,
            whiten_advantages="mean",
            auxiliary_reduction="token_mean",
            drop_uninformative=True,
            entropy_top_frac=0.5,
            entropy_coef=0.05,
            optimizer=sgd,
            seed=3,
        )
    if stage == "online dpo":
        return CannedOnlineDPO(
            source,
            [WeightedReward(LengthReward(target=4))],
            PREFERENCES["dpo"],
            reference=another(model),
            generation=GenerationSpec(max_new_tokens=10, num_samples=3),
            optimizer=sgd,
            seed=3,
        )
    return CannedPPO(
        source,
        [WeightedReward(LengthReward(target=4))],
        generation=GenerationSpec(max_new_tokens=10, temperature=0.7),
        updates=UpdateSpec(inner_epochs=1, num_minibatches=1),
        kl=KLSpec(loss_coef=0.3, loss_estimator="k2"),
        shaping=RewardShaping(whiten_rewards=True, scale_by_running_std=True),
        entropy_coef=0.05,
        whiten_advantages="sample",
        reduction="token_sum",
        auxiliary_reduction="sequence_mean",
        optimizer=sgd,
        seed=3,
    )


def step(
    stage: str,
    model: str,
    path: str,
    *,
    batch_size: int = 12,
    accumulate: int = 1,
    data: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one optimiser step over all records of `path`.

    Of a stage called "..., balanced per step" (or sequence) the routers' load-balancing loss too.
    """
    stage, _, over = stage.partition(", balanced per ")
    module = module_for(stage, model, **(spec or {}))
    if over:
        module.router_balance = RouterBalance(0.5, over)
    if stage.endswith("cached"):  # each number of processes measures its own
        module.reference_cache = str(Path(path).parent / f"{stage} {trainer.get('devices', 1)}")
    for name, value in (attributes or {}).items():
        setattr(module, name, value)
    if stage == "gkd":  # records beside its own answers, all twelve in every step
        beside = Path(path).parent / "beside.jsonl"
        if not beside.exists():
            beside.write_text("".join(json.dumps(record) + "\n" for record in records("sft")))
        size = 12 // (accumulate * trainer.get("devices", 1))
        data = {"pretraining": str(beside), "pretraining_batch_size": size} | (data or {})
    keep = Keep()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = L.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **trainer},
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(Path(path).parent),
            callbacks=[keep],
        )
        fit.fit(module, datamodule=RLHFDataModule(train=path, batch_size=batch_size, **(data or {})))
    return {k: float(v) for k, v in fit.callback_metrics.items()}, keep.gradients


if __name__ == "__main__":
    stage, model, path, out, *strategy = sys.argv[1:]
    on_policy = stage.split(", balanced")[0] in ("ppo", "grpo", "online dpo", "gkd")
    metrics, gradients = step(
        stage,
        model,
        path,
        batch_size=6 if on_policy else 2,
        accumulate=3,
        accelerator="cpu",
        devices=2,
        strategy=strategy[0] if strategy else "ddp",
    )
    if torch.distributed.get_rank() == 0:
        torch.save({"metrics": metrics, "gradients": gradients}, out)
        print(json.dumps(metrics))
