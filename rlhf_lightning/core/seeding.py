"""Counter-based seeds: every random draw is named by what it is for, so nothing depends on what was drawn before."""

import hashlib

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def counter_seed(run_seed: int, *counters: int | str) -> int:
    """A 63-bit seed that depends on nothing but its arguments.

        seed = first 63 bits of BLAKE2b("run_seed/counter/counter/...")

    A run that is killed and resumed asks for the same counters and draws the same numbers; no state is saved.

    Args:
        run_seed: the seed of the whole run.
        counters: what the draw is for, coarse to fine: purpose, step or rollout index, rank.
    """
    name = "/".join(str(part) for part in (run_seed, *counters))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def row_names(tokens: Int[Tensor, "rows time"], attention_mask: Bool[Tensor, "rows time"]) -> Int[Tensor, " rows"]:
    """A 64-bit number for each row, of its real tokens and nothing else: not of padding, width or the rows beside it.

    name = mix(sum over places p of mix(token_p + (p + 1) 2^32))
    """
    places = attention_mask.long().cumsum(-1)
    return _mixed(torch.where(attention_mask, _mixed(tokens.long() + (places << 32)), 0).sum(-1))


def pair_names(first: Int[Tensor, " pairs"], second: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """A 64-bit number for each pair of `row_names`; the order within a pair matters."""
    return _mixed(first + _mixed(second + _GOLDEN))


def uniforms(names: Int[Tensor, " names"], seed: int) -> Float[Tensor, " names"]:
    """For each name a number between 0 and 1, both left out, that depends on nothing but the name and the seed."""
    bits = _shifted(_mixed(names + _mixed(torch.as_tensor(seed, device=names.device))), 12)
    return (bits.double() + 0.5) / (1 << 52)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): every bit of the input changes half of the output's."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right as if there were no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
