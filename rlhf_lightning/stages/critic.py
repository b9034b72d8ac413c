"""The critic of an actor-critic stage: a model of its own, or a head on the policy."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.logprobs import about_tokens
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.quantized import check_trainable
from rlhf_lightning.models.scalar_head import ScalarModel, ValueHead, init_head
from rlhf_lightning.models.spec import ModelSpec

Critic = ScalarModel | ValueHead


@dataclass(frozen=True)
class CriticSpec:
    """Where values come from.

    Args:
        kind: a `separate` second model (Stiennon et al., 2020), or a linear head `shared` with the policy, on its
            hidden states (Ziegler et al., 2019).
        model: what a separate critic starts from: a reward model (its head is kept, as Stiennon et al. do) or a
            language model (a head of zeros is added). None: the policy's own starting point, all of its weights
            trained, whatever its lora and quantization.
        learning_rate: of the critic's parameters; None: the policy's.
        keep_head: start from the reward model's head; false: from zeros.
        clip_apart: trainer.gradient_clip_val bounds the gradients of policy and critic each by itself, as with two
            optimisers (OpenRLHF, verl); false: those of both together.
    """

    kind: Literal["separate", "shared"] = "separate"
    model: ModelSpec | None = None
    learning_rate: float | None = None
    keep_head: bool = True
    clip_apart: bool = False

    def __post_init__(self) -> None:
        if self.kind == "shared" and self.model is not None:
            raise UserError(
                "critic.model is given but critic.kind is shared, which has no model of its own: remove one"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"critic.learning_rate={self.learning_rate}: use a positive number, or leave it out")


def build_critic(spec: CriticSpec, policy: Policy, policy_spec: ModelSpec, *, seed: int) -> Critic:
    """The critic that `spec` asks for, reading the policy's tokens."""
    if spec.kind == "shared":
        return ValueHead(policy.config.get_text_config().hidden_size)
    start = spec.model or replace(policy_spec, lora=None, quantization=None)
    check_trainable(start)
    critic = load_scalar_model(start, pooling="last", seed=seed, head_init="zero")
    if not spec.keep_head:
        init_head(critic.head, "zero", seed)
    theirs, ours = (model.config.get_text_config().vocab_size for model in (critic, policy))
    if theirs != ours:
        raise UserError(
            f"the critic {start.path or 'built from config'} has {theirs} tokens, the policy "
            f"{policy_spec.path or 'built from config'} has {ours}: a critic reads the policy's tokens, so both need "
            "the same vocabulary. Leave critic.model out to start from the policy"
        )
    return critic


def critic_values(critic: Critic, policy: Policy, batch: Any, hidden: Tensor | None = None) -> Tensor:
    """What the critic expects before each token is drawn [batch, time].

    Args:
        hidden: the policy's hidden states of `batch`, if they are known; a shared critic reads them.
    """
    if isinstance(critic, ValueHead):
        if hidden is None:
            hidden = policy.hidden_states(batch.tokens, batch.attention_mask, batch.positions)
        return about_tokens(critic(hidden))
    said = critic.token_values(batch.tokens, batch.attention_mask, batch.positions)
    # a critic that was a reward model begins on the scale of its normalised scores
    return about_tokens((said - critic.score_mean) / critic.score_std)
