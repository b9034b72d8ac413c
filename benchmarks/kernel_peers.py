"""Other people's ways of computing what rlhf_kernels computes: their packages, and methods written down again here.

Packages are imported when called. A row named after a package runs that package; "verl's way" is our own code for the
method that verl uses, because verl cannot be imported without the rest of it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Inputs = dict[str, Tensor]


@dataclass
class Loss:
    """A scalar with the log-probabilities behind it."""

    loss: Tensor
    logprobs: Tensor


# log-probabilities


def logsumexp_by_row(i: Inputs) -> Tensor:
    """z_y - logsumexp(z), a row at a time: no softmax of all rows, a Python loop over them."""
    chosen = i["logits"].gather(-1, i["tokens"][:, None])[:, 0]
    return chosen.float() - torch.stack([row.float().logsumexp(-1) for row in i["logits"]])


def _rows_of_head(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def linear_by_rows(i: Inputs) -> Tensor:
    """512 rows of logits at a time, computed again in the backward pass: 8 N H V instead of 6."""
    parts = []
    for start in range(0, len(i["tokens"]), 512):
        rows = slice(start, start + 512)
        parts.append(checkpoint(_rows_of_head, i["hidden"][rows], i["weight"], i["tokens"][rows], use_reentrant=False))
    return torch.cat(parts)


def trl_selective(i: Inputs) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(i["logits"], i["tokens"])


def trl_kernel(i: Inputs) -> Tensor:
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(i["logits"][None], i["tokens"][None])[0][0]


def trl_linear(i: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(i["hidden"], i["weight"], None, i["tokens"], 1.0, 8192, None, 1.0, ())[0]


def liger_logprobs(i: Inputs) -> Tensor:
    """It leaves out the last position, so this does too; it has no backward pass."""
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax

    return fused_selective_log_softmax(i["logits"].detach()[None], i["tokens"][None, :-1], 1.0, None)[0]


def flash(i: Inputs) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return -cross_entropy_loss(i["logits"], i["tokens"])[0]


def quack(i: Inputs) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return -cross_entropy(i["logits"], i["tokens"], reduction="none")


def cut(i: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(i["hidden"], i["weight"], i["tokens"], reduction="none")


# policy losses


def trl_kernel_loss(i: Inputs) -> Loss:
    logprobs = trl_kernel(i)
    ratio = (logprobs - i["old"]).exp()
    loss = -torch.minimum(ratio * i["advantages"], ratio.clamp(0.8, 1.2) * i["advantages"])
    return Loss(loss.sum() / len(loss), logprobs)


def liger_loss(i: Inputs) -> Loss:
    """One advantage per sequence, here of all tokens but the last; it does not return log-probabilities."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    old = i["old"][None, :-1]
    loss, _, _ = triton_grpo_loss(
        i["logits"][None], old, None, i["tokens"][None, :-1], i["advantages"][:1], temperature=1.0, beta=0.0,
        eps_low=0.2, eps_high=0.2, inplace=False,
    )  # fmt: skip
    return Loss(loss.sum() / old.numel(), old[0] * math.nan)


def liger_linear(i: Inputs) -> Loss:
    """One advantage per sequence, here of all tokens; it does not return log-probabilities."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
        i["hidden"][None], i["weight"], i["tokens"][None], i["mask"][None].float(), i["advantages"][:1],
        old_per_token_logps=i["old"][None],
    )  # fmt: skip
    return Loss(loss, i["old"] * math.nan)


# divergences


def liger_linear_jsd(i: Inputs) -> Loss:
    """Its end that is KL(student || teacher), the mean over tokens; it does not return them."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    heads = (i["hidden"], i["weight"], i["ref_hidden"], i["ref_weight"])
    return Loss(LigerFusedLinearJSDFunction.apply(*heads, None, 1.0, -100, 1.0), i["old"] * math.nan)


# advantages


def gae_loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The recursion token by token, as most trainers write it."""
    next_value = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        held = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantage = torch.where(mask[:, t], held, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage * mask[:, t])
    return torch.stack(columns[::-1], 1)


def _compose(first: Any, second: Any) -> Any:
    """x -> a x + b, then another such map."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def gae_scan(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """torch's associative scan, twice: the next value that counts, then the advantages."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def scan(a: Tensor, b: Tensor) -> Tensor:
        flipped = (a.flip(-1), b.flip(-1))
        return associative_scan(_compose, flipped, dim=1, combine_mode="generic")[1].flip(-1)

    held = scan((~mask).to(values.dtype), torch.where(mask, values, 0.0))
    following = torch.nn.functional.pad(held[:, 1:], (0, 1))
    delta = torch.where(mask, rewards + gamma * following - values, 0.0)
    return scan(torch.where(mask, gamma * lam, 1.0).to(values.dtype), delta) * mask


def gae_convolution(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Rows as convolutions with powers of gamma lambda, cut below 1e-7; knows no mask."""
    delta = rewards + gamma * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    reach = min(values.shape[1], 315)
    kernel = (gamma * lam) ** torch.arange(reach, device=values.device, dtype=values.dtype)
    return torch.nn.functional.conv1d(torch.nn.functional.pad(delta, (0, reach - 1))[:, None], kernel[None, None])[:, 0]


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Masked mean and variance in the dtype of x."""
    counts = mask.to(x.dtype)
    mean = (x * counts).sum() / counts.sum()
    var = ((x - mean).square() * counts).sum() / counts.sum()
    return (x - mean) * torch.rsqrt(var + 1e-8) * counts
