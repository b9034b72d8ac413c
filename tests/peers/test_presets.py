"""The preset of TRL's GRPO has the numbers that TRL itself starts with."""

from pathlib import Path

import pytest
import yaml

trl = pytest.importorskip("trl")

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "presets"


def test_grpo_has_the_numbers_of_trl(tmp_path):
    theirs = trl.GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    preset = yaml.safe_load((PRESETS / "trl_grpo.yaml").read_text())
    ours, trainer = preset["model"]["init_args"], preset["trainer"]
    generation, optimizer = ours["generation"], ours["optimizer"]["init_args"]
    loss, credit = ours["loss"]["init_args"], ours["credit"]["init_args"]
    assert theirs.epsilon_high is None
    assert (loss["clip_low"], loss["clip_high"], loss["dual_clip"]) == (theirs.epsilon, theirs.epsilon, theirs.delta)
    assert (credit["std_over"], theirs.scale_rewards) == ("group", "group")
    assert (ours["reduction"], theirs.loss_type) == ("token_mean", "dapo")
    assert (ours["kl"]["loss_coef"], ours["use_reference"]) == (theirs.beta, theirs.beta > 0)
    assert ours["kl"]["loss_importance_weighted"] == theirs.use_bias_correction_kl
    assert (ours["entropy_coef"], ours["entropy_top_frac"]) == (theirs.entropy_coef, theirs.top_entropy_quantile)
    assert ours["mask_truncated"] == theirs.mask_truncated_completions
    assert ours["policy"]["disable_dropout"] == theirs.disable_dropout
    assert ours["policy"]["gradient_checkpointing"] == theirs.gradient_checkpointing
    assert generation["num_samples"] == theirs.num_generations
    assert generation["max_new_tokens"] == theirs.max_completion_length
    assert [generation[name] for name in ("temperature", "top_p", "top_k")] == [
        theirs.temperature,
        theirs.top_p,
        theirs.top_k,
    ]
    assert ours["updates"]["inner_epochs"] == theirs.num_iterations
    assert ours["updates"]["num_minibatches"] == theirs.steps_per_generation
    assert preset["data"]["batch_size"] * generation["num_samples"] == theirs.generation_batch_size
    assert optimizer == {
        "lr": theirs.learning_rate,
        "betas": [theirs.adam_beta1, theirs.adam_beta2],
        "eps": theirs.adam_epsilon,
        "weight_decay": theirs.weight_decay,
    }
    assert (ours["schedule"]["shape"], ours["schedule"]["warmup_frac"]) == (theirs.lr_scheduler_type.value, 0.0)
    assert theirs.warmup_steps == 0
    assert (trainer["max_epochs"], trainer["gradient_clip_val"]) == (theirs.num_train_epochs, theirs.max_grad_norm)
    assert preset["seed_everything"] == theirs.seed
