"""A run that is stopped anywhere and resumed ends with the same bits as one that was not."""

import warnings
from dataclasses import replace

import lightning as L
import pytest
import torch
from fits import fit as one_fit
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from one_step import another, records

from rlhf_lightning.advantages.kl_control import AdaptiveKL, FixedKL
from rlhf_lightning.callbacks import LastCheckpoint
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses import AdaptiveEntropy, SamplerCorrection
from rlhf_lightning.losses.distillation import Distillation
from rlhf_lightning.losses.preference_batch import BetaDPO
from rlhf_lightning.losses.preference_mixed import WeightedLoss, WeightedLosses
from rlhf_lightning.losses.preference_online import XPO
from rlhf_lightning.losses.preference_pointwise import BCOPair
from rlhf_lightning.losses.unpaired import BCO, KTO
from rlhf_lightning.models.reference import BEMA, ReferenceSync
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.replay import ReplaySpec
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
from rlhf_lightning.stages.grpo import DynamicSampling
from rlhf_lightning.stages.online_dpo import Opponent
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping
from rlhf_lightning.stages.schedule import Schedule

ON_POLICY = ("ppo", "ppo, ahead", "grpo", "grpo, ahead", "online dpo", "gkd, ahead")


WITH_MEMORY = WeightedLosses([WeightedLoss(BetaDPO(beta=0.5)), WeightedLoss(BCOPair(beta=0.5, shift_decay=0.7))])


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def module_for(stage, model):
    source = ModelSpec(path=str(model))
    # a schedule asks for the number of steps, which makes Lightning forget the state of the loader
    common = {"optimizer": adamw, "schedule": Schedule("cosine", warmup_frac=0.2), "seed": 5}
    if stage == "sft":
        return SFTModule(source, **common)
    if stage == "taught":
        return SFTModule(source, Distillation("jsd"), teacher=another(str(model)), **common)
    if stage == "reward":
        return RewardModule(source, normalise_on="train", **common)
    if stage == "dpo":
        return DPOModule(source, WITH_MEMORY, reference_sync=ReferenceSync(every=2, share=0.6), **common)
    if stage == "dpo, drawn pairs":
        return DPOModule(source, BetaDPO(beta=0.5, keep_frac=0.5), reference=another(str(model)), **common)
    if stage == "dpo, cached":
        return DPOModule(source, **common)
    if stage in ("kto", "kto, cached", "bco"):
        loss = BCO(beta=1.0) if stage == "bco" else KTO(beta=1.0)
        return KTOModule(source, loss, reference=another(str(model)), **common)
    ahead = stage.endswith("ahead")
    if stage.startswith("grpo"):
        return GRPOModule(
            source,
            [WeightedReward(LengthReward(target=3))],
            generation=GenerationSpec(max_new_tokens=4, num_samples=2, top_p=0.9, keep_logprobs=True),
            updates=UpdateSpec(inner_epochs=2, async_rollouts=ahead),
            dynamic_sampling=DynamicSampling(max_batches=3),
            replay=ReplaySpec(capacity=4),
            correction=SamplerCorrection(),
            entropy_top_frac=0.7,
            entropy_coef=0.1,
            entropy_control=AdaptiveEntropy(target=10.0, delta=0.05),
            reference_sync=ReferenceSync(every=2, share=0.6),
            **common,
        )
    if stage.startswith("gkd"):
        return GKDModule(
            source,
            another(str(model)),
            on_policy_frac=0.5,
            generation=GenerationSpec(max_new_tokens=4, num_samples=2),
            updates=UpdateSpec(inner_epochs=2, async_rollouts=ahead),
            **common,
        )
    if stage == "online dpo":
        return OnlineDPOModule(
            source,
            [WeightedReward(LengthReward(target=3))],
            XPO(alpha=0.01, loss=WITH_MEMORY),
            opponent=Opponent(reference_share=0.5),
            generation=GenerationSpec(max_new_tokens=4, num_samples=4),
            updates=UpdateSpec(inner_epochs=2),
            reference_sync=ReferenceSync(every=2, bema=BEMA(every=1, lag=2.0)),
            **common,
        )
    return PPOModule(
        source,
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=5, num_samples=2, keep_logprobs=ahead),
        updates=UpdateSpec(inner_epochs=2, num_minibatches=2, async_rollouts=ahead),
        correction=SamplerCorrection() if ahead else None,
        kl=KLSpec(control=AdaptiveKL(init_coef=0.1, target=0.5, horizon=100.0)),
        shaping=RewardShaping(scale_by_running_std=True),
        critic_warmup_steps=2,
        target_kl=0.02,
        ptx_coef=0.2,
        **common,
    )


def fit(stage, model, write_jsonl, folder, ckpt_path=None, callbacks=(), max_epochs=2, max_steps=-1, validated=False):
    module = module_for(stage, model)
    if stage.endswith("cached"):
        module.reference_cache = str(folder / "reference")
    data = RLHFDataModule(
        train=write_jsonl(f"{stage}.jsonl", records(stage)),
        pretraining=write_jsonl("texts.jsonl", records("sft")),
        batch_size=4 if stage in ON_POLICY else 2,
        pretraining_batch_size=2,
        val=write_jsonl("val.jsonl", records(stage)[:2]) if validated else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=max_epochs,
            max_steps=max_steps,
            num_sanity_val_steps=0,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
            callbacks=list(callbacks),
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer


class OutOfTime(L.Callback):
    """Stops a run after so many micro-batches; -1: at the end of the first epoch."""

    def __init__(self, micro_batches):
        self.micro_batches = micro_batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        last = self.micro_batches if self.micro_batches > 0 else trainer.num_training_batches
        trainer.should_stop = trainer.should_stop or batch_idx == last - 1


class NumberOfEpoch(L.Callback):
    """Something for a checkpoint to watch that every validation improves."""

    def on_validation_end(self, trainer, module):
        trainer.callback_metrics["val_epoch"] = torch.tensor(float(trainer.current_epoch))


def everything(module, trainer):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for index, moments in enumerate(trainer.optimizers[0].state.values()):
        state |= {f"optimiser {index} {name}": value.clone() for name, value in moments.items()}
    if isinstance(module, GRPOModule):
        kept = module.replay.state_dict()
        state["born"] = torch.tensor(kept["born"])
        state |= {f"replay {i} {name}": value for i, g in enumerate(kept["groups"]) for name, value in g.items()}
        state |= {f"reference {name}": value for name, value in module.reference.policy.state_dict().items()}
    if isinstance(module, PPOModule):
        state["kl_coef"] = torch.tensor(module.shaper.kl_coef, dtype=torch.float64)
        state["score_std"] = torch.tensor(module.shaper.score_moments.std, dtype=torch.float64)
    if isinstance(module, DPOModule | OnlineDPOModule):
        state |= {f"running mean {name}": torch.as_tensor(value) for name, value in module.objective.running.items()}
        if module.reference_sync is not None:
            state |= {f"reference {name}": value for name, value in module.reference.policy.state_dict().items()}
    if isinstance(module, KTOModule):
        state["rewards"] = torch.tensor(module._rewards.sums, dtype=torch.float64)
    return state


@pytest.mark.parametrize(
    "stage",
    [
        "sft",
        "taught",
        "reward",
        "dpo",
        "dpo, cached",
        "dpo, drawn pairs",
        "kto",
        "kto, cached",
        "bco",
        *ON_POLICY,
    ],
)
def test_resuming_ends_with_the_same_bits(stage, tiny_model, write_jsonl, tmp_path):
    keep_all = ModelCheckpoint(
        dirpath=tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
    )
    whole, trainer = fit(stage, tiny_model, write_jsonl, tmp_path, callbacks=[keep_all])
    expected = everything(whole, trainer)
    steps = trainer.global_step
    checkpoints = sorted((tmp_path / "all").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(checkpoints) == steps
    # on-policy: the first buffer, its end, the one after, the end of an epoch, and the last but one
    chosen = {0, 1, 3, 4, steps // 2 - 1, steps // 2, steps - 2} if stage in ON_POLICY else range(0, steps - 1, 2)
    for index in sorted(chosen):
        torch.manual_seed(index)  # whatever the global generator holds must not matter
        resumed = everything(*fit(stage, tiny_model, write_jsonl, tmp_path, ckpt_path=str(checkpoints[index])))
        assert resumed.keys() == expected.keys()
        different = [name for name, value in expected.items() if not torch.equal(value, resumed[name])]
        assert not different, f"resumed at step {index + 1} of {steps}: {different}"


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_resuming_at_one_end_of_an_epoch_after_another(stage, tiny_model, write_jsonl, tmp_path):
    """Left alone, Lightning forgets to count the epoch after the one that a run was resumed at the end of."""

    class EndOfEpoch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx + 1 == trainer.num_training_batches:
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    expected = everything(*fit(stage, tiny_model, write_jsonl, tmp_path, max_epochs=3))
    ckpt_path = None
    for epochs in (1, 2, 3):  # the last batch of epoch `epochs` writes what the next run goes on from
        run = fit(stage, tiny_model, write_jsonl, tmp_path, ckpt_path, [EndOfEpoch()], max_epochs=3)
        ckpt_path = str(tmp_path / f"{epochs - 1}.ckpt")
        resumed = everything(*run)
        different = [name for name, value in expected.items() if not torch.equal(value, resumed[name])]
        assert not different, f"resumed at the end of epoch {epochs - 1}: {different}"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_run_that_was_told_to_stop_inside_an_epoch_goes_on_with_its_rest(
    stage, micro_batch, tiny_model, write_jsonl, tmp_path
):
    """As max_time and early stopping do it. Left alone, Lightning counts the epoch as done."""

    expected = everything(*fit(stage, tiny_model, write_jsonl, tmp_path))
    _, stopped = fit(stage, tiny_model, write_jsonl, tmp_path, callbacks=[OutOfTime(micro_batch), LastCheckpoint()])
    assert stopped.global_step == 1  # the step of both micro-batches
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    resumed = everything(*fit(stage, tiny_model, write_jsonl, tmp_path, ckpt_path=last))
    different = [name for name, value in expected.items() if not torch.equal(value, resumed[name])]
    assert not different


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("writer", ["end of epoch", "end of validation"])
@pytest.mark.parametrize("max_steps", [-1, 99])
def test_resuming_behind_an_epoch_whose_last_step_is_done(stage, writer, max_steps, tiny_model, write_jsonl, tmp_path):
    """Left alone, Lightning leaves the next epoch out if there is a `max_steps`."""
    if writer == "end of epoch":
        callback, last = LastCheckpoint(), tmp_path / "checkpoints" / "last.ckpt"
    else:
        watch = {"monitor": "val_epoch", "mode": "max", "save_on_train_epoch_end": False}
        callback, last = ModelCheckpoint(tmp_path, "validated", **watch), "validated.ckpt"

    def run(ckpt_path=None, callbacks=()):
        options = {"max_epochs": 3, "max_steps": max_steps, "validated": writer == "end of validation"}
        return fit(stage, tiny_model, write_jsonl, tmp_path, ckpt_path, callbacks, **options)

    expected = everything(*run())
    run(callbacks=[OutOfTime(-1), NumberOfEpoch(), callback])
    resumed = everything(*run(str(tmp_path / last)))
    different = [name for name, value in expected.items() if not torch.equal(value, resumed[name])]
    assert not different


def test_another_number_of_processes_is_refused(tiny_model, write_jsonl, tmp_path):
    module = module_for("sft", tiny_model)
    state = {"world_size": 2, "global_rank": 0, "state": TrainerState(fn=TrainerFn.FITTING)}
    module._trainer = type("Two", (), state)()
    with pytest.raises(ValueError, match=r"written by 1 processes and is resumed by 2: use the same number"):
        module.on_load_checkpoint({"loader_progress": [{"given": 0, "loader": None}]})
    module._trainer.state = TrainerState(fn=TrainerFn.VALIDATING)  # weights are all it wants
    module.on_load_checkpoint({"loader_progress": [{"given": 0, "loader": None}]})


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_checkpoint_whose_weights_are_not_numbers_is_refused(stage, tiny_model, write_jsonl, tmp_path):
    keep = LastCheckpoint(dirpath=tmp_path)
    fit(stage, tiny_model, write_jsonl, tmp_path, callbacks=[keep], max_epochs=1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    next(iter(saved["state_dict"].values()))[0] = float("nan")
    torch.save(saved, tmp_path / "broken.ckpt")
    with pytest.raises(
        UserError, match=r"has weights that are NaN or infinite: policy.*embed_tokens.weight. Go on from"
    ):
        fit(stage, tiny_model, write_jsonl, tmp_path, ckpt_path=str(tmp_path / "broken.ckpt"))
    module = module_for(stage, tiny_model)
    module.model_spec = replace(module.model_spec, check_finite=False)
    module.configure_model()
    module.on_load_checkpoint({"state_dict": saved["state_dict"]})


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("linear", final_frac=0.5)])
def test_options_of_the_resumed_run_beat_those_of_the_checkpoint(schedule, tiny_model, write_jsonl, tmp_path):
    def run(lr, coef, epochs, ckpt_path=None):
        module = PPOModule(
            ModelSpec(path=str(tiny_model)),
            [WeightedReward(LengthReward(target=3))],
            generation=GenerationSpec(max_new_tokens=5),
            kl=KLSpec(control=FixedKL(coef)),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=lr),
            schedule=schedule,
            seed=5,
        )
        records_of = write_jsonl("ppo.jsonl", records("ppo"))
        trainer = one_fit(module, tmp_path, data={"train": records_of}, max_epochs=epochs, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
        return module, trainer.optimizers[0].param_groups[0], float(trainer.callback_metrics["kl/coef"])

    run(0.01, 0.05, 1)
    _, group, coef = run(0.02, 0.2, 2, str(tmp_path / "end.ckpt"))
    expected = run(0.02, 0.2, 2)[1]
    assert (group["lr"], group["weight_decay"], coef) == (expected["lr"], 0.02, pytest.approx(0.2))
