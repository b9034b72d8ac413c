"""The frozen model that a policy is held close to: outside every checkpoint, optimiser and gradient reduction."""

import copy
from contextlib import nullcontext
from typing import Any

import torch

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.logprobs import TokenScores
from rlhf_lightning.models.body import evaluating
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.policy import HasTokens, Policy
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
    def __call__(self, batch: HasTokens, *, temperature: float = 1.0) -> TokenScores:
        with evaluating(self.policy), self.policy.adapter_disabled() if self.shared else nullcontext():
            return self.policy(batch, temperature=temperature)

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

    def to(self, device: Any) -> None:
        """Nothing: there are no weights."""


def make_reference(policy: Policy, spec: ModelSpec | None = None) -> Reference:
    """What `policy` is now, frozen; or another model.

    Args:
        spec: another model to use; None: the policy without its adapter if it has one (no second copy of the weights),
            else a copy of it.
    """
    if spec is not None:
        other = load_policy(spec)
        ours, theirs = policy.head().weight.shape[0], other.head().weight.shape[0]
        if ours != theirs:
            raise UserError(
                f"the reference {spec.path or spec.config!r} knows {theirs} tokens and the policy {ours}: "
                "a KL needs one vocabulary; use the model that the policy was started from"
            )
        return Reference(other)
    if policy.has_adapter:
        return Reference(policy, shared=True)
    return Reference(copy.deepcopy(policy))
