"""What a model is cut into: one unit per decoder layer, and one of everything else."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.compiled import layers_of
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar_head import ScalarModel, ValueHead
from rlhf_lightning.models.sharded import RESHARDS
from rlhf_lightning.models.vocab_parallel import cut_head

ENTRANCES: dict[type[nn.Module], tuple[str, ...]] = {
    Policy: ("hidden_states", "shared_prompt_states", "generate", "next_logits"),
    ScalarModel: ("token_values",),
    ValueHead: (),
}
"""Methods besides `forward` through which a model is run; weights are gathered on the way in."""
RUNS = "runs_now"
"""Attribute of a sharded model: whether it is inside one of these methods, or `forward`."""


def models_of(module: nn.Module) -> list[nn.Module]:
    """The policies, scalar models and value heads in `module`."""
    return [part for part in module.modules() if isinstance(part, tuple(ENTRANCES))]


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy,
    *,
    reshard_after_forward: bool,
    cut_vocabulary: bool = False,
) -> None:
    """Share out the weights of `model` over `mesh`, in place; a model that is sharded stays as it is.

    Args:
        model: a `Policy`, `ScalarModel` or `ValueHead`.
        mesh: of one dimension: sharded over all of it; of two: copies over the first, sharded over the second.
        precision: dtypes of the gathered weights and of the reduced gradients.
        reshard_after_forward: let go of a layer's weights after its forward pass and gather them again for backward.
        cut_vocabulary: of two: the head of a policy is never gathered; each process keeps the logits of its tokens.
    """
    if isinstance(model, FSDPModule):
        return
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward)
        setattr(layer, RESHARDS, reshard_after_forward)
    apart: set[nn.Parameter] = set()
    if cut_vocabulary and isinstance(model, Policy):
        apart = set(cut_head(model, mesh, precision.param_dtype).parameters())
    # embedding, last norm and head. The head is applied to hidden states after the decoder has run, and must still be
    # gathered then, as must an embedding that it is tied to
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False, ignored_params=apart)
    setattr(model, RESHARDS, False)
    model.register_forward_pre_hook(lambda model, _: setattr(model, RUNS, True))
    model.register_forward_hook(lambda model, *_: setattr(model, RUNS, False), always_call=True)
    for name in next(names for kind, names in ENTRANCES.items() if isinstance(model, kind)):
        _make_entrance(model, name)


def _make_entrance(model: nn.Module, name: str) -> None:
    """Gather weights on the way into a method, if the model is not running already.

    torch takes the way out of a method that `forward` calls for the end of `forward`: weights that were to stay would
    be let go then, and gathered anew at the next call, which processes need not make equally often.
    """
    inside: Callable[..., Any] = getattr(model, name)
    register_fsdp_forward_method(model, name)
    gathering: Callable[..., Any] = getattr(model, name)

    def enter(*args: Any, **kwargs: Any) -> Any:
        if getattr(model, RUNS, False):
            return inside(*args, **kwargs)
        setattr(model, RUNS, True)
        try:
            return gathering(*args, **kwargs)
        finally:
            setattr(model, RUNS, False)

    setattr(model, name, enter)


def decoder_layers(model: nn.Module) -> Iterable[nn.Module]:
    """The layers of a transformers decoder, by the classes that it says must not be split."""
    if isinstance(model, ValueHead):
        return []
    decoder: Any = model.causal_lm if isinstance(model, Policy) else model.decoder
    layers = layers_of(decoder)
    if not layers:
        raise UserError(
            f"strategy fsdp2 or fsdp: models of type {decoder.config.model_type!r} do not say what their layers are "
            "(_no_split_modules), and would be gathered whole: use strategy: ddp"
        )
    return layers


def check_all_sharded(module: nn.Module) -> None:
    """Raise if a parameter is trained that every rank would move on its own."""
    loose = [n for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if loose:
        more = f" (and {len(loose) - 1} more)" if len(loose) > 1 else ""
        raise UserError(
            f"strategy fsdp2: {loose[0]}{more} is trained outside every sharded unit, so its gradient would not be "
            "added over processes: put it into a Policy, ScalarModel or ValueHead, freeze it, or use strategy: ddp"
        )
