"""The policy as it was when a rollout was complete: a copy to sample from while the policy itself is trained."""

import copy
from typing import Any

import torch

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RolloutEngine
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.sharded import is_sharded
from rlhf_lightning.rollout.decode import why_not
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec


class FrozenCopy(RolloutEngine):
    """`HFGenerate` on a copy of what is trained; weights that are frozen (the base under an adapter) are not copied.

    Args:
        engine: how answers are drawn.
    """

    says_kept = HFGenerate.says_kept
    says_entropy = HFGenerate.says_entropy
    heeds_rows_at_once = HFGenerate.heeds_rows_at_once

    def __init__(self, engine: HFGenerate) -> None:
        # a fast tokenizer is not for two threads at a time
        self._engine = HFGenerate(engine.spec, copy.deepcopy(engine.tokenizer))
        self._held: list[Policy] = []
        """The copy, if there is one; of all engines that share it."""

    @property
    def policy(self) -> Policy | None:
        """The copy."""
        return self._held[0] if self._held else None

    def with_spec(self, spec: GenerationSpec) -> "FrozenCopy":
        other = copy.copy(self)
        other._engine = self._engine.with_spec(spec)
        return other

    @torch.no_grad()
    def take_weights(self, policy: Policy) -> None:
        if self.policy is None:
            _refuse(policy)
            # copies require a gradient as what they copy does: torch multiplies in another order if they do not
            shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
            self._held.append(copy.deepcopy(policy, shared).eval())
            return
        mine, theirs = ((*model.parameters(), *model.buffers()) for model in (self.policy, policy))
        for own, given in zip(mine, theirs, strict=True):
            if own is not given:
                own.copy_(given)

    def close(self) -> None:
        self._held.clear()

    def generate(self, policy: Any, prompts: PromptBatch, *, seed: int) -> Generated:
        assert self.policy is not None, "it was given no weights"
        return self._engine.generate(self.policy, prompts, seed=seed)


def _refuse(policy: Policy) -> None:
    if is_sharded(policy):
        raise UserError(
            "updates.async_rollouts=true with HFGenerate samples from a copy of the policy, whose weights "
            "trainer.strategy shares out over processes: use strategy ddp, or leave async_rollouts out"
        )
    reason = why_not(policy)
    if reason is not None:
        raise UserError(
            f"updates.async_rollouts=true: models of type {policy.config.model_type!r} are sampled from by "
            f"transformers' own generate ({reason}), which draws from the generator that training draws from: use "
            "VLLMEngine or VLLMServer, or leave async_rollouts out"
        )
