"""Which models have routers that can be listened to, and how."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.body import attention_of, body_states, evaluating
from rlhf_lightning.models.compiled import is_compiled
from rlhf_lightning.models.routing import heard, hearing

SIGMOID = ("deepseek_v3",)
"""Families whose routers compare sigmoids of their logits: these, normalised, are their probabilities."""
SOFTMAX = ("deepseek_v2",)
"""Families with a softmax for which transformers has no balancing loss of its own."""


def watch_routers(body: Any, option: str) -> None:
    """Let the routers of a transformers decoder be heard.

    Args:
        option: what asks for it, as the user has set it.
    Raises:
        UserError: there are none, or what they say is not known.
    """
    name = body.config.model_type
    routers = list(_routers_of(body))
    if not routers:
        raise UserError(
            f"{option} balances the experts of a mixture, and models of type {name!r} have no router, or none that "
            "transformers knows of: set it to 0"
        )
    if name not in SIGMOID + SOFTMAX and not hasattr(sys.modules[type(body).__module__], "load_balancing_loss_func"):
        raise UserError(
            f"{option}: transformers has no such loss for models of type {name!r}, and what their routers' logits mean "
            "is not known here: set it to 0"
        )
    if is_compiled(body):
        raise UserError(f"{option}: routers of compiled layers are not heard: leave compile out, or set it to 0")
    for router in routers:
        router.register_forward_hook(_say_sigmoid if name in SIGMOID else _say_softmax)
    device = next(body.parameters()).device
    # as for the check of the head: where models are loaded other kernels do not run
    if device.type != "meta" and attention_of(body) in ("sdpa", "eager"):
        tokens = torch.arange(4, device=device)[None]
        with evaluating(body), torch.no_grad(), heard(pool_layers=False):
            body_states(body, tokens % body.config.get_text_config().vocab_size, tokens >= 0, tokens)


def _routers_of(body: Any) -> Iterator[nn.Module]:
    known = (getattr(type(body), "_can_record_outputs", None) or {}).get("router_logits", [])
    recorders = known if isinstance(known, list) else [known]
    kinds = tuple(kind for x in recorders if (kind := getattr(x, "target_class", None)) is not None)
    return (part for part in body.modules() if isinstance(part, kinds))


# functions of a module, not closures over one: a copy of the model keeps its hooks
def _say_softmax(router: nn.Module, inputs: Any, output: Any) -> None:
    _say(router, output, lambda logits: logits.softmax(-1))


def _say_sigmoid(router: nn.Module, inputs: Any, output: Any) -> None:
    _say(router, output, lambda logits: torch.nn.functional.normalize(logits.sigmoid(), p=1, dim=-1))


def _say(router: nn.Module, output: Any, probabilities: Callable[[Tensor], Tensor]) -> None:
    listener = hearing()
    if listener is None:
        return
    parts = output if isinstance(output, tuple) else (output,)
    if len(parts) != 3 or parts[0].dim() != 2 or parts[2].dim() != 2 or parts[2].is_floating_point():
        raise UserError(
            f"router_aux_loss_coef: routers of class {type(router).__name__} do not say their logits and the experts "
            "that they chose: set it to 0"
        )
    listener.say(parts[0], parts[2], probabilities)
