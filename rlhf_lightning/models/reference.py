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
from rlhf_lightning.models.routing import unheard
from rlhf_lightning.models.sharded import load_whole_state_dict, reshard, whole_state_dict
from rlhf_lightning.models.spec import ModelSpec


class Reference:
    """Scores tokens without gradient. Deliberately not an `nn.Module`: a module that holds one does not register it,
    so it is saved, optimised and moved by nobody but its owner.

    Args:
        policy: the model that scores.
        shared: True where `policy` is the one being trained, and the reference is it without its adapter.
        trail: what BEMA remembers of the policy that the reference follows; None: it follows no such way.
    """

    def __init__(self, policy: Policy, *, shared: bool = False, trail: "Trail | None" = None) -> None:
        assert not shared or policy.has_adapter
        self.policy = policy
        self.shared = shared
        self.trail = trail
        if not shared:
            policy.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self, batch: HasTokens, *, temperature: float = 1.0, answers: Bool[Tensor, "batch time"] | None = None
    ) -> TokenScores:
        with self.as_it_was():
            return self.policy(batch, temperature=temperature, answers=answers)

    @torch.no_grad()
    def hidden_states(self, batch: HasTokens, *, answers: Bool[Tensor, "batch time"] | None = None) -> Tensor:
        """Hidden states as the output head reads them [batch, time, hidden]; the head itself is `policy.head()`."""
        rows = batch.tokens, batch.attention_mask, batch.positions, getattr(batch, "segments", None)
        with self.as_it_was():
            return self.policy.hidden_states(*rows, answers=answers)

    @torch.no_grad()
    def shared_prompt_states(self, batch: HasTokens) -> Tensor:
        """The same for pairs of rows, i and i + rows/2, whose common prompt is computed once."""
        with self.as_it_was():
            return self.policy.shared_prompt_states(batch.tokens, batch.attention_mask, batch.positions, batch.mask)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """While this lasts, `policy` is the reference: its adapter off where it is the one being trained."""
        with evaluating(self.policy), unheard(), self.policy.adapter_disabled() if self.shared else nullcontext():
            yield

    @torch.no_grad()
    def follow(self, policy: Policy, share: float) -> None:
        """Move every weight towards the policy's: ref <- share policy + (1 - share) ref.

        Args:
            policy: of the same shape; see `make_reference`.
            share: 1 copies.
        """
        assert not self.shared, "a reference that is the policy without its adapter has nothing to move"
        _mix(self.policy, policy, share)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, on the CPU: for the checkpoint of a run whose reference is no longer what it was loaded as."""
        return {
            f"{prefix}{name}": value
            for prefix, model in self._models.items()
            for name, value in whole_state_dict(model).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up weights that `state_dict` gave.

        Raises:
            UserError: they are of a run that did not follow by BEMA, and this one does, or the other way round.
        """
        remembered = any(name.startswith(_TRAIL) for name in state)
        if remembered != (self.trail is not None):
            did, does = ("followed", "does not") if remembered else ("did not follow", "does")
            raise UserError(
                f"the run of the checkpoint {did} the policy by reference_sync.bema, and this one {does}: resume with "
                "the same reference_sync, or start a new run from the exported model"
            )
        for prefix, model in self._models.items():
            own = [name for name in state if name.startswith(prefix) and (prefix or not name.startswith(_TRAIL))]
            load_whole_state_dict(model, {name.removeprefix(prefix): state[name] for name in own})

    @property
    def _models(self) -> dict[str, Policy]:
        """The models, by what their weights' names begin with in `state_dict`."""
        if self.trail is None:
            return {"": self.policy}
        return {"": self.policy, f"{_TRAIL}start.": self.trail.start, f"{_TRAIL}average.": self.trail.average}

    def own_models(self) -> list[Policy]:
        """The models that belong to the reference alone."""
        return [] if self.shared else list(self._models.values())

    def to(self, device: Any) -> None:
        """Move the weights; does nothing where they are the policy's own."""
        for model in self.own_models():
            model.to(device)


_TRAIL = "trail."


class Trail:
    """What BEMA remembers of a policy: where it set out from, and the average of where it has been.

    Args:
        policy: as it is now.
    """

    def __init__(self, policy: Policy) -> None:
        self.start, self.average = (_copy_of(policy).eval().requires_grad_(False) for _ in range(2))


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
class BEMA:
    """A bias-corrected moving average of the policy, for a reference that lags behind smoothly.

        average <- (1 - b_t) average + b_t policy,    b_t = max((lag + multiplier t)^-ema_power, min_share)
        ref      = average + a_t (policy - start),    a_t = (lag + multiplier t)^-bias_power

    at optimiser step t; start is the policy `after` so many steps, and what the average begins with. It keeps two more
    copies of the weights, in the policy's dtype.

    Args:
        every: optimiser steps from one update of the average to the next (TRL: update_freq).
        ema_power: kappa; 0: no average, the policy itself.
        bias_power: eta; the larger, the less of the correction is left.
        lag: rho, the age that the average is taken to have at the start.
        multiplier: gamma, how fast it ages.
        min_share: the least b_t (TRL: min_ema_multiplier).
        after: steps before which nothing is remembered (TRL: update_after, and ref_model_update_after).

    References:
        Block and Zhang, EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes, 2025. arXiv:2508.00180
    """

    every: int = 400
    ema_power: float = 0.5
    bias_power: float = 0.2
    lag: float = 10.0
    multiplier: float = 1.0
    min_share: float = 0.0
    after: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"bema.every={self.every}: the average is updated every 1 or more optimiser steps")
        if self.after < 0:
            raise UserError(f"bema.after={self.after} is a number of optimiser steps: give 0 or more")
        for name in ("ema_power", "bias_power", "multiplier"):
            if getattr(self, name) < 0:
                raise UserError(f"bema.{name}={getattr(self, name)}: shares fall with the steps taken; give 0 or more")
        if self._age(self.after + self.every) < 1:
            raise UserError(
                f"bema.lag={self.lag} with multiplier={self.multiplier} would give the policy a share above 1: give a "
                "lag of 1 or more"
            )
        if not 0 <= self.min_share <= 1:
            raise UserError(f"bema.min_share={self.min_share} is a share of the policy: give 0 to 1")

    def remember(self, step: int, trail: Trail, policy: Policy) -> None:
        """Take the policy up into what is remembered, if it is time."""
        if step == self.after:
            _mix(trail.start, policy, 1.0)
            _mix(trail.average, policy, 1.0)
        elif step > self.after and (step - self.after) % self.every == 0:
            _mix(trail.average, policy, max(self._age(step) ** -self.ema_power, self.min_share))

    @torch.no_grad()
    def move(self, step: int, reference: Reference, policy: Policy) -> None:
        """The reference to where the average says, corrected."""
        assert reference.trail is not None
        correction, trail = self._age(step) ** -self.bias_power, reference.trail
        models = (reference.policy, trail.average, trail.start, policy)
        for model in models:
            reshard(model)
        for mine, average, start, now in zip(*(model.parameters() for model in models), strict=True):
            mine.copy_(average + correction * (now.to(average) - start))

    def _age(self, step: int) -> float:
        return self.lag + self.multiplier * step


@dataclass(frozen=True)
class ReferenceSync:
    """A reference that follows the policy.

        ref <- share policy + (1 - share) ref,  every so many optimiser steps

    Args:
        every: optimiser steps from one move to the next (TR-DPO: 256 to 1024 hard, 1 soft; TRL: 512).
        share: 1 copies the policy (hard); below 1 mixes (soft; TR-DPO: 0.5 to 0.6; TRL: 0.6).
        bema: a bias-corrected moving average of the policy instead of a share; `every` counts from its `after`.

    References:
        Gorbatovski et al., Learn Your Reference Model for Real Good Alignment, 2024. arXiv:2404.09656
    """

    every: int = 512
    share: float = 1.0
    bema: BEMA | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"every={self.every}: the reference follows every 1 or more optimiser steps")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share} is the policy's share in the new reference: give above 0, to 1")
        if self.bema is not None and self.share != 1:
            raise UserError(f"share={self.share} has no effect with bema, which has shares of its own: leave one out")
        if self.bema is not None and self.every % self.bema.every:
            raise UserError(
                f"every={self.every} falls between two updates of the average, bema.every={self.bema.every}: give a "
                "multiple of it"
            )

    def after_step(self, step: int, reference: Reference, policy: Policy) -> None:
        """Move the reference if it is time.

        Args:
            step: optimiser steps taken, this one included.
        """
        if self.bema is None:
            if step % self.every == 0:
                reference.follow(policy, self.share)
            return
        assert reference.trail is not None
        self.bema.remember(step, reference.trail, policy)
        if step > self.bema.after and (step - self.bema.after) % self.every == 0:
            self.bema.move(step, reference, policy)


@torch.no_grad()
def _mix(model: Policy, policy: Policy, share: float) -> None:
    """Every weight towards the policy's; share 1 copies."""
    reshard(model)
    reshard(policy)
    for mine, theirs in zip(model.parameters(), policy.parameters(), strict=True):
        if share == 1:
            mine.copy_(theirs)
        else:
            mine.lerp_(theirs.to(mine), share)


def make_reference(policy: Policy, spec: ModelSpec | None = None, *, sync: ReferenceSync | None = None) -> Reference:
    """What `policy` is now, frozen; or another model.

    Args:
        spec: another model to use; None: the policy without its adapter if it has one (no second copy of the weights),
            else a copy of it.
        sync: how the reference is to be moved towards the policy later on; None: it stays. One that moves gets weights
            of its own in any case.
    """
    if sync is not None and (is_quantized(policy) or (spec is not None and spec.quantization is not None)):
        raise UserError(
            "reference_sync moves every weight of the reference, and quantised ones cannot move: leave quantization "
            "out, or reference_sync"
        )
    trail = None if sync is None or sync.bema is None else Trail(policy)
    if spec is not None:
        other = load_policy(spec)
        ours, theirs = policy.head().weight.shape[0], other.head().weight.shape[0]
        if ours != theirs:
            raise UserError(
                f"the reference {spec.path or spec.config!r} knows {theirs} tokens and the policy {ours}: "
                "a KL needs one vocabulary; use the model that the policy was started from"
            )
        if sync is not None and _shapes(policy) != _shapes(other):
            raise UserError(
                f"the reference {spec.path or spec.config!r} is to follow the policy, whose weights have other names "
                "or shapes: leave reference out, or reference_sync"
            )
        return Reference(other, trail=trail)
    if policy.has_adapter and sync is None:
        return Reference(policy, shared=True)
    return Reference(_copy_of(policy), trail=trail)


def _copy_of(policy: Policy) -> Policy:
    copied = copy.deepcopy(policy)
    if is_compiled(policy):  # a copy's layers are not
        compile_layers(copied.causal_lm)
    return copied


def _shapes(policy: Policy) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in policy.named_parameters()]
