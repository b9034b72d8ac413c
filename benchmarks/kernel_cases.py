"""What bench_kernels.py times: for each op, its inputs, ours, plain torch, and the peers of `kernel_peers`."""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import kernel_peers as peers
import rlhf_kernels as ours
import torch
from kernel_checks import LOGPROB, head_tolerance
from kernel_peers import Loss
from torch import Tensor

Inputs = dict[str, Tensor]


@dataclass
class Case:
    """One implementation of an op."""

    call: Callable[[Inputs], Any]
    leaves: tuple[str, ...]
    """Inputs whose gradients the backward pass is timed for; () = no backward."""
    read: Callable[[Any], Tensor]
    """The per-token numbers in what `call` returns."""
    exact: Callable[[Inputs], Tensor]
    """The same numbers in float64."""
    tolerance: Callable[[Inputs], float]
    relative: bool = False
    bytes_moved: Callable[[Inputs], int] | None = None
    flops: Callable[[tuple[int, ...]], float] | None = None

    def scalar(self, result: Any) -> Tensor:
        return getattr(result, "loss", None) if getattr(result, "loss", None) is not None else self.read(result).sum()

    def error(self, result: Any, exact: Tensor) -> float:
        numbers = self.read(result).detach().double()
        difference = (numbers - exact[: len(numbers)]).abs().max()
        return float(difference / exact.abs().max() if self.relative else difference)


def build(op: str, shape: tuple[int, ...], device: str, seed: int) -> Inputs:
    """Random inputs: logits with the spread of a trained model, never zeros."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    if op == "masked_whiten":
        return {
            "x": normal(*shape, dtype=torch.float32) * 3 + 1,
            "mask": torch.rand(shape, generator=generator, device=device) > 0.2,
        }
    if op == "gae":
        batch, length = shape
        mask = torch.rand(batch, length, generator=generator, device=device) > 0.2
        inputs = {name: normal(batch, length, dtype=torch.float32) for name in ("logprobs", "ref", "values")}
        nothing = torch.full((batch, length), math.nan, device=device)
        return {**inputs, "mask": mask, "scores": normal(batch, dtype=torch.float32), "nothing": nothing}
    rows, vocab = shape[0], shape[-1]
    inputs = {"tokens": torch.randint(vocab, (rows,), generator=generator, device=device)}
    if op.startswith("linear"):
        inputs["hidden"] = normal(rows, shape[1]).requires_grad_()
        inputs["weight"] = normal(vocab, shape[1]).mul_(4 / shape[1] ** 0.5).requires_grad_()
    else:
        inputs["logits"] = normal(rows, vocab).mul_(4).requires_grad_()
    if op == "linear_exact_kl":  # two models of one family: alike, and not the same
        inputs["ref_hidden"] = inputs["hidden"].detach() + normal(rows, shape[1]).mul_(0.1)
        inputs["ref_weight"] = inputs["weight"].detach().clone()
    if op == "exact_kl":
        inputs["ref_logits"] = normal(rows, vocab).mul_(4)
    # near the policy's own, as in training: a ratio beyond its bounds has no gradient, and we do not compute it
    inputs["old"] = _exact_logprobs(inputs).float() + normal(rows, dtype=torch.float32).mul_(0.1)
    inputs["advantages"] = normal(rows, dtype=torch.float32)
    inputs["mask"] = torch.ones(rows, dtype=torch.bool, device=device)
    return inputs


def _exact_logprobs(i: Inputs) -> Tensor:
    """In float64, a few rows at a time."""
    parts = []
    weight = i["weight"].detach().double().T if "weight" in i else None
    for start in range(0, len(i["tokens"]), 64):
        rows = slice(start, start + 64)
        inputs = i["logits" if weight is None else "hidden"][rows].detach().double()
        logits = inputs if weight is None else inputs @ weight
        parts.append(logits.log_softmax(-1).gather(-1, i["tokens"][rows, None])[:, 0])
    return torch.cat(parts)


def _backend(name: str, call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    def run(inputs: Inputs) -> Any:
        os.environ["RLHF_KERNELS_BACKEND"] = name
        return call(inputs)

    return run


class Implementation(NamedTuple):
    """How an op is computed, and what that needs."""

    call: Callable[[Inputs], Any]
    device: str = "any"
    """`cuda`: runs nowhere else."""
    package: str = ""
    """Module that has to be installed."""
    backward: bool = True
    """False: it cannot give gradients."""
    tolerance: Callable[[Inputs], float] | None = None
    """Its own; None: that of the op."""


def _kernels(call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """By the kernels, on a GPU or in the interpreter."""
    return _backend("triton" if os.environ.get("TRITON_INTERPRET") == "1" else "auto", call)


def _fused(i: Inputs, tile: tuple[int, ...] | None = None, **how: Any) -> Tensor:
    from rlhf_kernels.rows import Transform
    from rlhf_kernels.triton_linear import Tile, linear_stats_triton

    how["tile"] = None if tile is None else Tile(*tile)
    hidden, weight = i["hidden"].detach(), i["weight"].detach()
    return linear_stats_triton(hidden, weight, None, i["tokens"], Transform(), with_entropy=False, **how).logprobs


def _mine(call: Callable[[Inputs], Any]) -> dict[str, Implementation]:
    """Ours: the kernels on a GPU (or in the interpreter), the reference everywhere."""
    return {
        "rlhf_kernels (Triton)": Implementation(_kernels(call), "cuda"),
        "rlhf_kernels (reference)": Implementation(_backend("reference", call)),
    }


def _naive_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def _naive_policy(logits: Tensor, i: Inputs) -> tuple[Tensor, Tensor]:
    return _policy_from(_naive_logprobs(logits, i["tokens"]), i)


def _policy_from(logprobs: Tensor, i: Inputs) -> tuple[Tensor, Tensor]:
    ratio = (logprobs - i["old"]).exp()
    loss = -torch.minimum(ratio * i["advantages"], ratio.clamp(0.8, 1.2) * i["advantages"])
    return loss.sum() / len(loss), logprobs


class Op:
    """An op and its implementations; `Op(None)` is any of them, for the exact numbers."""

    def __init__(self, shared: dict[str, Any], implementations: dict[str, Implementation]) -> None:
        self.shared, self.implementations = shared, implementations

    def obstacle(self, name: str, device: str) -> str | None:
        """Why an implementation cannot run, or None."""
        implementation = self.implementations[name]
        if implementation.device not in ("any", device) and os.environ.get("TRITON_INTERPRET") != "1":
            return f"needs {implementation.device.upper()}"
        if implementation.package and importlib.util.find_spec(implementation.package) is None:
            return f"{implementation.package} is not installed"
        return None

    def __call__(self, name: str | None) -> Case:
        name = name or next(iter(self.implementations))
        implementation = self.implementations[name]
        leaves = self.shared["leaves"] if implementation.backward else ()
        own = {} if implementation.tolerance is None else {"tolerance": implementation.tolerance}
        return Case(call=implementation.call, **{**self.shared, "leaves": leaves, **own})


def _first(result: Any) -> Tensor:
    """The numbers themselves, or the second of (loss, numbers)."""
    if isinstance(result, Tensor):
        return result
    return result.logprobs if hasattr(result, "logprobs") else result[1]


def _logits_ops() -> dict[str, Op]:
    shared = {"leaves": ("logits",), "read": _first, "exact": _exact_logprobs, "tolerance": lambda i: LOGPROB}
    shared["bytes_moved"] = lambda i: 3 * i["logits"].numel() * i["logits"].element_size()
    compiled = torch.compile(_naive_logprobs)
    compiled_loss = torch.compile(_naive_policy)
    scores = {
        **_mine(lambda i: ours.token_logprobs(i["logits"], i["tokens"])),
        "torch": Implementation(lambda i: _naive_logprobs(i["logits"], i["tokens"])),
        "torch.compile": Implementation(lambda i: compiled(i["logits"], i["tokens"]), "cuda"),
        "logsumexp row by row (verl's way)": Implementation(peers.logsumexp_by_row),
        "TRL selective_log_softmax": Implementation(peers.trl_selective, package="trl"),
        "TRL log-prob and entropy kernel": Implementation(peers.trl_kernel, "cuda", "trl"),
        "Liger log-softmax (no backward)": Implementation(peers.liger_logprobs, "cuda", "liger_kernel", False),
        "flash-attn cross entropy": Implementation(peers.flash, "cuda", "flash_attn"),
        "quack cross entropy": Implementation(peers.quack, "cuda", "quack"),
    }
    losses = {
        **_mine(lambda i: ours.policy_loss(
            i["logits"], i["tokens"], i["old"], i["advantages"], mask=i["mask"], denominator=len(i["tokens"]))),
        "torch": Implementation(lambda i: Loss(*_naive_policy(i["logits"], i))),
        "torch.compile": Implementation(lambda i: Loss(*compiled_loss(i["logits"], i)), "cuda"),
        "TRL log-prob kernel, torch loss": Implementation(peers.trl_kernel_loss, "cuda", "trl"),
        "Liger triton_grpo_loss": Implementation(peers.liger_loss, "cuda", "liger_kernel"),
    }  # fmt: skip
    kl = {
        **_mine(lambda i: ours.exact_kl(i["logits"], i["ref_logits"])),
        "torch": Implementation(lambda i: _naive_kl(i["logits"].float(), i["ref_logits"].float())),
    }
    kl_shared = {**shared, "exact": lambda i: _naive_kl(i["logits"].detach().double(), i["ref_logits"].double())}
    kl_shared["bytes_moved"] = lambda i: 4 * i["logits"].numel() * i["logits"].element_size()
    return {"token_logprobs": Op(shared, scores), "policy_loss": Op(shared, losses), "exact_kl": Op(kl_shared, kl)}


def _naive_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


ROUNDED = "rlhf_kernels (fused, rounded sums)"


def _linear_loss(i: Inputs, method: Any = "chunked", sums: Any = "tensor_cores") -> Any:
    return ours.linear_policy_loss(
        i["hidden"], i["weight"], i["tokens"], i["old"], i["advantages"], mask=i["mask"], denominator=len(i["tokens"]),
        method=method, sums=sums,
    )  # fmt: skip


def _linear_ops() -> dict[str, Op]:
    shared = {"leaves": ("hidden", "weight"), "read": _first, "exact": _exact_logprobs}
    shared["tolerance"] = lambda i: head_tolerance(i["hidden"])
    shared["flops"] = lambda shape: 6.0 * shape[0] * shape[1] * shape[2]
    scores = {
        **_mine(lambda i: ours.linear_token_logprobs(i["hidden"], i["weight"], i["tokens"])),
        "rlhf_kernels (fused)": Implementation(
            _kernels(lambda i: ours.linear_token_logprobs(i["hidden"], i["weight"], i["tokens"], method="fused")),
            "cuda",
        ),
        ROUNDED: Implementation(
            _kernels(
                lambda i: ours.linear_token_logprobs(
                    i["hidden"], i["weight"], i["tokens"], method="fused", sums="rounded"
                )
            ),
            "cuda",
            tolerance=lambda i: LOGPROB,
        ),
        # what else the fused kernel could be: to choose by, not to ship
        "fused, pointers": Implementation(_kernels(lambda i: _fused(i, descriptors=False)), "cuda", backward=False),
        "fused, 128 x 128 x 64": Implementation(
            _kernels(lambda i: _fused(i, tile=(128, 128, 64, 4, 8))), "cuda", backward=False
        ),
        "fused, 64 x 256 x 64": Implementation(
            _kernels(lambda i: _fused(i, tile=(64, 256, 64, 4, 8))), "cuda", backward=False
        ),
        "torch": Implementation(lambda i: _naive_logprobs(i["hidden"] @ i["weight"].T, i["tokens"])),
        "512 rows at a time (verl's way)": Implementation(peers.linear_by_rows),
        "TRL chunked log-probs": Implementation(peers.trl_linear, package="trl"),
        "apple cut-cross-entropy": Implementation(peers.cut, "cuda", "cut_cross_entropy"),
    }
    losses = {
        **_mine(_linear_loss),
        "rlhf_kernels (fused)": Implementation(_kernels(lambda i: _linear_loss(i, "fused")), "cuda"),
        ROUNDED: Implementation(
            _kernels(lambda i: _linear_loss(i, "fused", "rounded")), "cuda", tolerance=lambda i: LOGPROB
        ),
        "torch": Implementation(lambda i: Loss(*_naive_policy(i["hidden"] @ i["weight"].T, i))),
        "512 rows at a time (verl's way)": Implementation(
            lambda i: Loss(*_policy_from(peers.linear_by_rows(i), i))
        ),
        "Liger fused linear GRPO": Implementation(peers.liger_linear, package="liger_kernel"),
    }  # fmt: skip
    kl = {
        **_mine(lambda i: ours.linear_exact_kl(i["hidden"], i["weight"], i["ref_hidden"], i["ref_weight"])),
        "torch": Implementation(lambda i: _kl_of_states(i, torch.float32)),
        "Liger fused linear JSD": Implementation(peers.liger_linear_jsd, "cuda", "liger_kernel"),
    }
    kl_shared = {**shared, "exact": _exact_kl_of_states}
    del kl_shared["flops"]  # four products or six: not the six N H V of the others
    return {
        "linear_token_logprobs": Op(shared, scores),
        "linear_policy_loss": Op(shared, losses),
        "linear_exact_kl": Op(kl_shared, kl),
    }


def _kl_of_states(i: Inputs, dtype: torch.dtype) -> Tensor:
    logits, ref_logits = i["hidden"] @ i["weight"].T, i["ref_hidden"] @ i["ref_weight"].T
    return _naive_kl(logits.to(dtype), ref_logits.to(dtype))


def _exact_kl_of_states(i: Inputs) -> Tensor:
    """In float64, a few rows at a time."""
    weights = {name: i[name].detach().double() for name in ("weight", "ref_weight")}
    parts = []
    for start in range(0, len(i["tokens"]), 64):
        rows = slice(start, start + 64)
        states = {name: i[name][rows].detach().double() for name in ("hidden", "ref_hidden")}
        parts.append(_kl_of_states({**weights, **states}, torch.float64))
    return torch.cat(parts)


GAMMA, LAM, BETA = 1.0, 0.95, 0.1


def _shaped(i: Inputs) -> Tensor:
    mask = i["mask"]
    last = mask.flip(-1).cumsum(-1).flip(-1) == 1
    return torch.where(mask, -BETA * (i["logprobs"] - i["ref"]), 0.0) + torch.where(
        mask & last, i["scores"][:, None], 0.0
    )


def _gae(recursion: Callable[..., Tensor]) -> Implementation:
    return Implementation(lambda i: recursion(_shaped(i), i["values"], i["mask"], GAMMA, LAM))


def _copy(i: Inputs) -> Tensor:
    """What moves as many bytes as the advantages have to, and computes nothing."""
    source = torch.empty(i["values"].numel() * 29 // 2, dtype=torch.uint8, device=i["values"].device)
    torch.empty_like(source).copy_(source)
    return i["nothing"]


def _token_ops() -> dict[str, Op]:
    def double(inputs: Inputs) -> Inputs:
        return {k: v if v.dtype == torch.bool else v.double() for k, v in inputs.items()}

    shared = {
        "leaves": (), "read": lambda x: x.advantages if hasattr(x, "advantages") else x, "tolerance": lambda i: 2e-6,
        "relative": True, "exact": lambda i: _gae(peers.gae_loop).call(double(i)),
        "bytes_moved": lambda i: i["values"].numel() * (3 * 4 + 1 + 4 * 4),
    }  # fmt: skip
    implementations = {
        **_mine(lambda i: ours.kl_shaped_gae(
            i["scores"], i["logprobs"], i["ref"], i["values"], i["mask"], kl_coef=BETA, gamma=GAMMA, lam=LAM)),
        "Python loop over tokens": _gae(peers.gae_loop),
        "torch associative_scan": _gae(peers.gae_scan),
        "convolution (wrong where tokens are masked)": _gae(peers.gae_convolution),
        "a copy of as many bytes": Implementation(_copy),
    }  # fmt: skip
    whiten = {
        **_mine(lambda i: ours.masked_whiten(i["x"], i["mask"])),
        "torch": Implementation(lambda i: peers.whiten(i["x"], i["mask"])),
    }
    whiten_shared = {
        **shared, "exact": lambda i: peers.whiten(i["x"].double(), i["mask"]),
        "bytes_moved": lambda i: i["x"].numel() * (4 + 1 + 4 + 1 + 4),
    }  # fmt: skip
    return {"gae": Op(shared, implementations), "masked_whiten": Op(whiten_shared, whiten)}


CASES: dict[str, Op] = {**_logits_ops(), **_linear_ops(), **_token_ops()}
