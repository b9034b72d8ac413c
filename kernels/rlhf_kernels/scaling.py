"""Gradients that were computed in the forward pass, multiplied by what arrives in the backward pass."""

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton


def refuse_second_derivative(op: str) -> None:
    """In a backward pass: a stored gradient would pass for a constant, and a second derivative be wrong in silence."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the gradient of {op} has no gradient of its own, which create_graph=True asks for: "
            "leave that out, or compute this loss with plain torch"
        )


def last_use(saved: Tensor) -> bool:
    """Whether a backward pass may overwrite or free what was saved for it: nobody reads it again.

    Not while a graph is traced (a subclass of Tensor only records), nor where the graph is kept and may come again.
    """
    traced = torch.compiler.is_compiling() or type(saved) is not Tensor
    return not (traced or torch._C._autograd._get_current_graph_task_keep_graph())


def scaled(op: str, grads: Tensor, factor: Tensor) -> Tensor:
    """grads * factor, written over `grads`; where factor is 1, the usual case, nothing is read or written.

    Called in the backward pass of `op`. One that keeps its graph may come again, so it gets a copy.

    Args:
        op: named where a second derivative is refused.
        grads: [..., n].
        factor: a scalar, or [...]: one per row.
    """
    refuse_second_derivative(op)
    if not last_use(grads):
        return grads * (factor if factor.ndim == 0 else factor[..., None]).to(grads.dtype)
    _scale(grads, factor)
    return grads


@torch.library.custom_op("rlhf_kernels::scale_rows_", mutates_args={"grads"})
def _scale(grads: Tensor, factor: Tensor) -> None:
    if use_triton("scale_rows", grads):
        from rlhf_kernels.triton_rows import scale_rows_triton

        return scale_rows_triton(grads, factor)
    if bool((factor == 1).all()):
        return None
    grads.mul_((factor if factor.ndim == 0 else factor[..., None]).to(grads.dtype))
    return None
