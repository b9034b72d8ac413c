"""A low-rank adapter in vLLM's workers: taken up from memory, where vLLM itself would read a folder."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.handover import adapter_rank

AdapterOption = Literal["merged", "sent"]
"""How an adapter reaches an engine: added into the weights, all of which are handed over every time; or alone, beside
the base, which is handed over once."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank (`max_lora_rank`)."""


def check_adapter_option(adapter: str) -> None:
    """Raise for what is no way to hand an adapter over."""
    if adapter not in ("merged", "sent"):
        raise UserError(f"engine.adapter={adapter!r}: use merged or sent")


def room_for(rank: int) -> int:
    """The least `max_lora_rank` for an adapter of `rank`.

    Raises:
        UserError: there is none.
    """
    for room in RANKS:
        if rank <= room:
            return room
    raise UserError(
        f"lora.r={rank}: vLLM takes adapters up to rank {RANKS[-1]}: lower it, or set engine.adapter: merged"
    )


def adapter_request(name: str, number: int) -> Any:
    """What tells vLLM to answer with an adapter that its workers hold: it looks for a folder only if they do not.

    Args:
        name: known prompts are told apart by it: give none twice.
        number: from 1 on; what the workers know it by.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, "handed over in memory")


def take_adapter(worker: Any, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Hold an adapter in the place of the one before; runs in a worker of vLLM 0.32.

    Args:
        worker: vLLM's.
        number: as in `adapter_request`; not that of the one before.
        tensors: what `adapter_weights` gives.

    Raises:
        UserError: the worker has no place for it. Then it holds none.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager
    held = manager._adapter_manager
    rank, room = adapter_rank(tensors), manager.lora_config.max_lora_rank
    if rank > room:
        raise UserError(
            f"lora.r={rank}, and vLLM was started for adapters up to rank {room}: start it anew (a server with "
            f"--max-lora-rank {room_for(rank)}), or set engine.adapter: merged"
        )
    names = getattr(held.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        number,
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        # its scale is in B already
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if names is None else names.get_rename_mapper(),
    )
    manager.remove_all_adapters()
    held.add_adapter(adapter)
    # vLLM passes by what it has no place for
    if strangers := sorted(adapter.loras.keys() - held.modules.keys()):
        manager.remove_all_adapters()
        raise UserError(
            f"vLLM has no place for an adapter of {strangers[0]}: leave it out of lora.target_modules, or set "
            "engine.adapter: merged"
        )
    held.activate_adapter(number)
