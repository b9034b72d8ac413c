"""What the tests against OpenRLHF share: its own command line's options, and small random batches.

Its parser stands in the script's `if __name__ == "__main__"`, behind imports of a cluster and an engine. The statements
that build it are run as they stand; everything after is not.
"""

import argparse
import ast
from datetime import datetime
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from peer_packages import peer_file, peer_module
from torch import Tensor

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of a few dozen terms in another order


@cache
def openrlhf_parser(script: str) -> argparse.ArgumentParser:
    """The parser of `openrlhf/cli/SCRIPT.py`."""
    source = ast.parse(peer_file(f"openrlhf/cli/{script}.py").read_text())
    main = next(node for node in source.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))
    parsing = next(i for i, node in enumerate(main.body) if "parse_args" in ast.unparse(node))
    names: dict[str, Any] = {"argparse": argparse, "datetime": datetime}
    exec(compile(ast.Module(main.body[:parsing], []), script, "exec"), names)
    parser = names["parser"]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def openrlhf_arguments(script: str = "train_ppo_ray", **options: Any) -> SimpleNamespace:
    """Its arguments at their defaults, grouped as it groups them, but for `options`: algo__kl__init_coef=0.1 and so on.

    What its script fills in after parsing is filled in here too: the two ends of the clip.
    """
    args = openrlhf_parser(script).parse_args([])
    for name, value in options.items():
        dotted = name.replace("__", ".")
        assert hasattr(args, dotted), f"OpenRLHF has no option {dotted}"
        setattr(args, dotted, value)
    grouped = peer_module("openrlhf.utils.config").hierarchize(args)
    if script == "train_ppo_ray" and grouped.actor.eps_clip_low_high is None:
        grouped.actor.eps_clip_low_high = (grouped.actor.eps_clip, grouped.actor.eps_clip)
    assert isinstance(grouped, SimpleNamespace)
    return grouped


def ragged(lengths: list[int]) -> Tensor:
    """A mask of answers of these lengths, right-padded [batch, time]."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def logprobs_like(mask: Tensor, *, seed: int, scale: float = 1.0, near: Tensor | None = None) -> Tensor:
    """Log-probabilities of sampled tokens, 0 off the mask; `near` others if given."""
    noise = scale * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    start = torch.full(mask.shape, -1.5) if near is None else near.detach()
    return torch.where(mask, (start + noise).clamp(max=-1e-3), 0.0)


def assert_same_value_and_gradient(ours: Tensor, theirs: Tensor, parameter: Tensor, **tolerance: float) -> None:
    """Of two losses of one parameter."""
    within = TOLERANCE | tolerance
    torch.testing.assert_close(ours, theirs, **within)
    mine, other = (torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (ours, theirs))
    assert other.abs().max() > 1e-4, "a comparison of zeros shows nothing"
    torch.testing.assert_close(mine, other, **within)


def their_actor(model: Any, *, temperature: float = 1.0) -> Any:
    """Their `Actor` around a language model, or around the one in a folder."""
    from transformers import AutoModelForCausalLM

    network = model if isinstance(model, torch.nn.Module) else AutoModelForCausalLM.from_pretrained(model)
    actor = peer_module("openrlhf.models.actor").Actor(network, temperature=temperature)
    actor.packing_samples = False  # set only where it loads a model itself
    return actor
