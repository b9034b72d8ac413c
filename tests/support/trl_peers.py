"""What the tests against TRL's trainers share."""

from typing import Any

import pytest
import torch
from fits import fit
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, autograd

from rlhf_lightning.core.batches import PairBatch
from rlhf_lightning.core.interfaces import PreferenceLoss
from rlhf_lightning.stages import DPOModule

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of a few dozen terms in another order


def options(config: type, folder: Any, *, rows: int = 3, **more: Any) -> Any:
    """A TRL config for one batch on the CPU in float32."""
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_num_workers": 0}
    return config(output_dir=str(folder), per_device_train_batch_size=rows, **quiet, **plain, **more)


def gradients_of(loss: Tensor, parameter: Tensor) -> Tensor:
    return autograd.grad(loss, parameter)[0]


def our_loss(module: DPOModule, loss: PreferenceLoss, batch: PairBatch) -> Tensor:
    """What `training_step` minimises."""
    module.loss = loss
    output = module.pair_loss(batch, module(batch))
    return module.objective.share(output, batch)


def assert_same_loss_and_gradients(ours: Tensor, theirs: Tensor, policy: Any, model: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in policy.causal_lm.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    mine = torch.autograd.grad(ours, list(policy.causal_lm.parameters()))
    other = torch.autograd.grad(theirs, list(model.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in other)
    assert largest > 1e-4, "a comparison of zeros shows nothing"
    for name, a, b in zip(names, mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * largest, msg=name)


def twenty_steps(ours: DPOModule, theirs: Any, folder: Any, records: str) -> None:
    """Both trained for as long; asserts that losses and weights are the same, and that something was learnt."""
    losses = []
    compute = theirs.compute_loss
    theirs.compute_loss = lambda *args, **more: losses.append(compute(*args, **more)) or losses[-1]
    theirs.train()

    logged = []
    keep = LambdaCallback(on_train_batch_end=lambda t, *_: logged.append(t.callback_metrics["train/loss"].item()))
    data = {"train": records, "batch_size": 4, "max_length": 64}
    fit(ours, folder, data=data, max_epochs=20, gradient_clip_val=1.0, callbacks=[keep])

    assert len(logged) == len(losses) == 20
    assert logged == pytest.approx([loss.item() for loss in losses], abs=1e-4)
    assert logged[-1] < logged[0] - 0.05
    for (name, mine), other in zip(ours.policy.causal_lm.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, msg=name)
