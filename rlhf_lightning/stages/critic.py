"""The critic of an actor-critic stage: a model of its own, or a head on the policy."""

from dataclasses import dataclass, replace
from typing import Literal

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import ModelSpec


@dataclass(frozen=True)
class CriticSpec:
    """Where values come from."""

    kind: Literal["separate", "shared"] = "separate"
    """A second model (Stiennon et al., 2020), or a linear head on the policy's hidden states (Ziegler et al., 2019)."""
    model: ModelSpec | None = None
    """What a separate critic starts from: a reward model (its head is kept, as Stiennon et al. do) or a language model
    (a head of zeros is added). None: the policy's own starting point."""
    learning_rate: float | None = None
    """Of the critic's parameters; None: the policy's."""
    keep_head: bool = True
    """Start from the reward model's head; false: from zeros."""

    def __post_init__(self) -> None:
        if self.kind == "shared" and self.model is not None:
            raise UserError(
                "critic.model is given but critic.kind is shared, which has no model of its own: remove one"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"critic.learning_rate={self.learning_rate}: use a positive number, or leave it out")

    def spec(self, policy: ModelSpec) -> ModelSpec:
        """The model that a separate critic starts from."""
        if self.model is not None:
            return self.model
        return replace(policy, lora=None)
