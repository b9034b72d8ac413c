"""What bench_kernels.py times: for each op, its inputs, ours, plain torch, and the peers that are installed."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rlhf_kernels as ours
import torch
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
    tolerance: float
    relative: bool = False
    bytes_moved: Callable[[Inputs], int] | None = None
    flops: Callable[[tuple[int, ...]], float] | None = None

    def scalar(self, result: Any) -> Tensor:
        return getattr(result, "loss", None) if getattr(result, "loss", None) is not None else self.read(result).sum()

    def error(self, result: Any, exact: Tensor) -> float:
        difference = (self.read(result).detach().double() - exact).abs().max()
        return float(difference / exact.abs().max() if self.relative else difference)


def build(op: str, shape: tuple[int, ...], device: str, seed: int) -> Inputs:
    """Random inputs: logits with the spread of a trained model, never zeros."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    if op == "gae":
        batch, length = shape
        mask = torch.rand(batch, length, generator=generator, device=device) > 0.2
        inputs = {name: normal(batch, length, dtype=torch.float32) for name in ("logprobs", "ref", "values")}
        return {**inputs, "mask": mask, "scores": normal(batch, dtype=torch.float32)}
    rows, vocab = shape[0], shape[-1]
    inputs = {"tokens": torch.randint(vocab, (rows,), generator=generator, device=device)}
    if op.startswith("linear"):
        inputs["hidden"] = normal(rows, shape[1]).requires_grad_()
        inputs["weight"] = normal(vocab, shape[1]).mul_(4 / shape[1] ** 0.5).requires_grad_()
    else:
        inputs["logits"] = normal(rows, vocab).mul_(4).requires_grad_()
    if op == "exact_kl":
        inputs["ref_logits"] = normal(rows, vocab).mul_(4)
    inputs["old"] = normal(rows, dtype=torch.float32).mul_(0.3) - 10
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


def _mine(call: Callable[[Inputs], Any]) -> dict[str, tuple[str, Callable[[Inputs], Any]]]:
    """Ours: the kernels on a GPU, the reference everywhere."""
    return {
        "rlhf_kernels (Triton)": ("cuda", _backend("auto", call)),
        "rlhf_kernels (reference)": ("any", _backend("reference", call)),
    }


def _naive_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def _naive_policy(logits: Tensor, i: Inputs) -> tuple[Tensor, Tensor]:
    logprobs = _naive_logprobs(logits, i["tokens"])
    ratio = (logprobs - i["old"]).exp()
    loss = -torch.minimum(ratio * i["advantages"], ratio.clamp(0.8, 1.2) * i["advantages"])
    return loss.sum() / len(loss), logprobs


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


class Op:
    """An op and its implementations; `Op(None)` is any of them, for the exact numbers."""

    def __init__(self, shared: dict[str, Any], implementations: dict[str, tuple[str, Callable[[Inputs], Any]]]) -> None:
        self.shared, self.implementations = shared, implementations

    def names(self, device: str) -> list[str]:
        return [name for name, (kind, _) in self.implementations.items() if kind in ("any", device)]

    def __call__(self, name: str | None) -> Case:
        name = name or next(iter(self.implementations))
        return Case(call=self.implementations[name][1], **self.shared)


def _first(result: Any) -> Tensor:
    """The numbers themselves, or the second of (loss, numbers)."""
    if isinstance(result, Tensor):
        return result
    return result.logprobs if hasattr(result, "logprobs") else result[1]


def _logits_ops() -> dict[str, Op]:
    shared = {"leaves": ("logits",), "read": _first, "exact": _exact_logprobs, "tolerance": 1e-5}
    shared["bytes_moved"] = lambda i: 3 * i["logits"].numel() * i["logits"].element_size()
    compiled = torch.compile(_naive_logprobs)
    scores = {
        **_mine(lambda i: ours.token_logprobs(i["logits"], i["tokens"])),
        "torch": ("any", lambda i: _naive_logprobs(i["logits"], i["tokens"])),
        "torch.compile": ("cuda", lambda i: compiled(i["logits"], i["tokens"])),
    }
    if _installed("trl"):
        scores["TRL selective_log_softmax"] = ("any", _trl)
    if _installed("flash_attn"):
        scores["flash-attn cross entropy"] = ("cuda", _flash)
    if _installed("quack"):
        scores["quack cross entropy"] = ("cuda", _quack)
    if _installed("liger_kernel"):
        scores["Liger GRPO log-softmax"] = ("cuda", _liger_logprobs)
    losses = {
        **_mine(lambda i: ours.policy_loss(
            i["logits"], i["tokens"], i["old"], i["advantages"], mask=i["mask"], denominator=len(i["tokens"]))),
        "torch": ("any", lambda i: _Loss(*_naive_policy(i["logits"], i))),
    }  # fmt: skip
    kl = {
        **_mine(lambda i: ours.exact_kl(i["logits"], i["ref_logits"])),
        "torch": ("any", lambda i: _naive_kl(i["logits"].float(), i["ref_logits"].float())),
    }
    kl_shared = {**shared, "exact": lambda i: _naive_kl(i["logits"].detach().double(), i["ref_logits"].double())}
    return {"token_logprobs": Op(shared, scores), "policy_loss": Op(shared, losses), "exact_kl": Op(kl_shared, kl)}


@dataclass
class _Loss:
    loss: Tensor
    logprobs: Tensor


def _naive_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _trl(i: Inputs) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(i["logits"], i["tokens"])


def _flash(i: Inputs) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return -cross_entropy_loss(i["logits"], i["tokens"])[0]


def _quack(i: Inputs) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return -cross_entropy(i["logits"], i["tokens"], reduction="none")


def _liger_logprobs(i: Inputs) -> Tensor:
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax

    return fused_selective_log_softmax(i["logits"][None], i["tokens"][None, :-1])[0]


def _linear_ops() -> dict[str, Op]:
    shared = {"leaves": ("hidden", "weight"), "read": _first, "exact": _exact_logprobs, "tolerance": 1e-5}
    shared["flops"] = lambda shape: 6.0 * shape[0] * shape[1] * shape[2]
    scores = {
        **_mine(lambda i: ours.linear_token_logprobs(i["hidden"], i["weight"], i["tokens"])),
        "torch": ("any", lambda i: _naive_logprobs(i["hidden"] @ i["weight"].T, i["tokens"])),
    }
    if _installed("cut_cross_entropy"):
        scores["apple cut-cross-entropy"] = ("cuda", _cut)
    losses = {
        **_mine(lambda i: ours.linear_policy_loss(
            i["hidden"], i["weight"], i["tokens"], i["old"], i["advantages"], mask=i["mask"],
            denominator=len(i["tokens"]))),
        "torch": ("any", lambda i: _Loss(*_naive_policy(i["hidden"] @ i["weight"].T, i))),
    }  # fmt: skip
    if _installed("liger_kernel"):
        losses["Liger fused linear GRPO"] = ("cuda", _liger_linear)
    return {"linear_token_logprobs": Op(shared, scores), "linear_policy_loss": Op(shared, losses)}


def _cut(i: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(i["hidden"], i["weight"], i["tokens"], reduction="none")


def _liger_linear(i: Inputs) -> _Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
        i["hidden"][None], i["weight"], i["tokens"][None], i["mask"][None], i["advantages"][:1],
        old_per_token_logps=i["old"][None],
    )  # fmt: skip
    with torch.no_grad():
        return _Loss(loss, _naive_logprobs(i["hidden"] @ i["weight"].T, i["tokens"]))


GAMMA, LAM, BETA = 1.0, 0.95, 0.1


def _shaped(i: Inputs) -> Tensor:
    mask = i["mask"]
    last = mask.flip(-1).cumsum(-1).flip(-1) == 1
    return torch.where(mask, -BETA * (i["logprobs"] - i["ref"]), 0.0) + torch.where(
        mask & last, i["scores"][:, None], 0.0
    )


def _loop(i: Inputs) -> Tensor:
    """The recursion token by token, as most trainers write it."""
    rewards, values, mask = _shaped(i), i["values"], i["mask"].to(i["values"].dtype)
    next_value = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        held = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * advantage
        advantage = torch.where(i["mask"][:, t], held, advantage)
        next_value = torch.where(i["mask"][:, t], values[:, t], next_value)
        columns.append(advantage * mask[:, t])
    return torch.stack(columns[::-1], 1)


def _convolution(i: Inputs) -> Tensor:
    """Rows as convolutions with powers of gamma lambda, cut below 1e-7; right only where no token is masked."""
    rewards, values = _shaped(i), i["values"]
    delta = rewards + GAMMA * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    reach = min(values.shape[1], 315)
    kernel = (GAMMA * LAM) ** torch.arange(reach, device=values.device, dtype=values.dtype)
    return torch.nn.functional.conv1d(torch.nn.functional.pad(delta, (0, reach - 1))[:, None], kernel[None, None])[:, 0]


def _gae_op() -> dict[str, Op]:
    shared = {
        "leaves": (), "read": lambda x: x.advantages if hasattr(x, "advantages") else x, "tolerance": 2e-6,
        "relative": True,
        "exact": lambda i: _loop({k: v if v.dtype == torch.bool else v.double() for k, v in i.items()}),
        "bytes_moved": lambda i: i["values"].numel() * (3 * 4 + 1 + 4 * 4),
    }  # fmt: skip
    implementations = {
        **_mine(lambda i: ours.kl_shaped_gae(
            i["scores"], i["logprobs"], i["ref"], i["values"], i["mask"], kl_coef=BETA, gamma=GAMMA, lam=LAM)),
        "Python loop over tokens": ("any", _loop),
        "convolution (no holes)": ("any", _convolution),
    }  # fmt: skip
    return {"gae": Op(shared, implementations)}


CASES: dict[str, Op] = {**_logits_ops(), **_linear_ops(), **_gae_op()}
