"""What the tests against TRL's trainers share."""

from typing import Any

from torch import Tensor, autograd

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of a few dozen terms in another order


def options(config: type, folder: Any, *, rows: int = 3, **more: Any) -> Any:
    """A TRL config for one batch on the CPU in float32."""
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_num_workers": 0}
    return config(output_dir=str(folder), per_device_train_batch_size=rows, **quiet, **plain, **more)


def gradients_of(loss: Tensor, parameter: Tensor) -> Tensor:
    return autograd.grad(loss, parameter)[0]
