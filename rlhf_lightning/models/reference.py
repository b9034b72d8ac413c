"""The frozen model that a policy is held close to: outside every checkpoint, optimiser and gradient reduction."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.logprobs import TokenScores
from rlhf_lightning.models.body import evaluating
from rlhf_lightning.models.compiled import compile_layers, is_compiled
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import HasTokens, Policy
from rlhf_lightning.models.quantized import is_quantized
from rlhf_lightning.models.sharded import load_whole_state_dict, reshard, whole_state_dict
from rlhf_lightning.models.spec import ModelSpec


class Reference:
    """Scores tokens without gradient. Deliberately not an `nn.Module`: a module that holds one does not register it,
    so it is saved, optimised and moved by nobody but its owner.

    Args:
        policy: the model that scores.
        shared: True where `policy` is the one being trained, and the reference is it without its adapter.
    """

    def __init__(self, policy: Policy, *, shared: bool = False) -> None:
        assert not shared or policy.has_adapter
        self.policy = policy
        self.shared = shared
        if not shared:
            policy.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self, batch: HasTokens, *, temperature: float = 1.0, answers: Bool[Tensor, "batch time"] | None = None
    ) -> TokenScores:
        with self.as_it_was():
            return self.policy(batch, temperature=temperature, answers=answers)

    @torch.no_grad()
    def hidden_states(self, batch: HasTokens) -> Tensor:
        """Hidden states as the output head reads them [batch, time, hidden]; the head itself is `policy.head()`."""
        with self.as_it_was():
            return self.policy.hidden_states(
                batch.tokens, batch.attention_mask, batch.positions, getattr(batch, "segments", None)
            )

    @torch.no_grad()
    def shared_prompt_states(self, batch: HasTokens) -> Tensor:
        """The same for pairs of rows, i and i + rows/2, whose common prompt is computed once."""
        with self.as_it_was():
            return self.policy.shared_prompt_states(batch.tokens, batch.attention_mask, batch.positions, batch.mask)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """While this lasts, `policy` is the reference: its adapter off where it is the one being trained."""
        with evaluating(self.policy), self.policy.adapter_disabled() if self.shared else nullcontext():
            yield

    @torch.no_grad()
    def follow(self, policy: Policy, share: float) -> None:
        """Move every weight towards the policy's: ref <- share policy + (1 - share) ref.

        Args:
            policy: of the same shape; see `make_reference(follows=True)`.
            share: 1 copies.
        """
        assert not self.shared, "a reference that is the policy without its adapter has nothing to move"
        reshard(self.policy)
        reshard(policy)
        for mine, theirs in zip(self.policy.parameters(), policy.parameters(), strict=True):
            if share == 1:
                mine.copy_(theirs)
            else:
                mine.lerp_(theirs.to(mine), share)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, on the CPU: for the checkpoint of a run whose reference is no longer what it was loaded as."""
        return whole_state_dict(self.policy)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up weights that `state_dict` gave."""
        load_whole_state_dict(self.policy, state)

    def own_models(self) -> list[Policy]:
        """The models that belong to the reference alone."""
        return [] if self.shared else [self.policy]

    def to(self, device: Any) -> None:
        """Move the weights; does nothing where they are the policy's own."""
        if not self.shared:
            self.policy.to(device)


class MeasuredReference:
    """A reference whose log-probabilities were measured beforehand and come with the batch: no second model."""

    def __call__(self, batch: TokenBatch, *, temperature: float = 1.0) -> TokenScores:
        """The log-probabilities; what the most probable tokens were is not known (`is_argmax` is False)."""
        assert temperature == 1.0, "references are measured at temperature 1"
        assert batch.ref_logprobs is not None, "this batch was not measured"
        return TokenScores(batch.ref_logprobs, None, torch.zeros_like(batch.mask))

    def own_models(self) -> list[Policy]:
        """None: there are no weights."""
        return []

    def to(self, device: Any) -> None:
        """Nothing: there are no weights."""


@dataclass(frozen=True)
class ReferenceSync:
    """A reference that follows the policy.

        ref <- share policy + (1 - share) ref,  every so many optimiser steps

    Args:
        every: optimiser steps from one move to the next (TR-DPO: 256 to 1024 hard, 1 soft; TRL: 512).
        share: 1 copies the policy (hard); below 1 mixes (soft; TR-DPO: 0.5 to 0.6; TRL: 0.6).

    References:
        Gorbatovski et al., Learn Your Reference Model for Real Good Alignment, 2024. arXiv:2404.09656
    """

    every: int = 512
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"every={self.every}: the reference follows every 1 or more optimiser steps")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share} is the policy's share in the new reference: give above 0, to 1")

    def after_step(self, step: int, reference: Reference, policy: Policy) -> None:
        """Move the reference if it is time.

        Args:
            step: optimiser steps taken, this one included.
        """
        if step % self.every == 0:
            reference.follow(policy, self.share)


def make_reference(policy: Policy, spec: ModelSpec | None = None, *, follows: bool = False) -> Reference:
    """What `policy` is now, frozen; or another model.

    Args:
        spec: another model to use; None: the policy without its adapter if it has one (no second copy of the weights),
            else a copy of it.
        follows: the reference is to be moved towards the policy later on: it gets weights of its own in any case.
    """
    if follows and (is_quantized(policy) or (spec is not None and spec.quantization is not None)):
        raise UserError(
            "reference_sync moves every weight of the reference, and quantised ones cannot move: leave quantization "
            "out, or reference_sync"
        )
    if spec is not None:
        other = load_policy(spec)
        ours, theirs = policy.head().weight.shape[0], other.head().weight.shape[0]
        if ours != theirs:
            raise UserError(
                f"the reference {spec.path or spec.config!r} knows {theirs} tokens and the policy {ours}: "
                "a KL needs one vocabulary; use the model that the policy was started from"
            )
        if follows and _shapes(policy) != _shapes(other):
            raise UserError(
                f"the reference {spec.path or spec.config!r} is to follow the policy, whose weights have other names "
                "or shapes: leave reference out, or reference_sync"
            )
        return Reference(other)
    if policy.has_adapter and not follows:
        return Reference(policy, shared=True)
    copied = copy.deepcopy(policy)
    if is_compiled(policy):  # a copy's layers are not
        compile_layers(copied.causal_lm)
    return Reference(copied)


def _shapes(policy: Policy) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in policy.named_parameters()]
