"""Any policy loss, weighed anew at every step by how far the policy is from what sampled."""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PolicyLoss, PolicyLossOutput
from rlhf_lightning.losses.correction import SamplerCorrection
from rlhf_lightning.losses.policy import Reinforce


@dataclass(frozen=True)
class Corrected(PolicyLoss):
    """A policy loss whose tokens are weighed, or dropped, by the ratio of the present policy to the one that sampled.

        loss_t = weight_t loss'_t,     weight = sg(correction(logprobs, old_logprobs))

    The stage's own `correction` weighs once, by the policy as the trainer computes it against what the sampler said;
    this one at every optimiser step, by the policy that the step has come to. It is meant for `old_logprobs: sampler`,
    and is verl's bypass mode: `Reinforce` with the weights of `correction` is its loss_type reinforce, and
    `ClippedSurrogate` with `weight: none`, whose own ratio is that weight already, its ppo_clip.

    Args:
        loss: of which each token is weighed.
        correction: the weights, and the filters; `normalise` divides by the mean over a micro-batch here.
    """

    loss: PolicyLoss = Reinforce()
    correction: SamplerCorrection = SamplerCorrection()

    def __post_init__(self) -> None:
        if isinstance(self.loss, Corrected):
            raise UserError("loss=Corrected around Corrected weighs twice: give the filters of both to one correction")

    @property
    def whole_batch(self) -> bool:
        return self.loss.whole_batch or self.correction.normalise

    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput:
        output = self.loss(logprobs, old_logprobs, advantages, mask)
        weights = self.correction(logprobs, old_logprobs, mask).weights
        return replace(output, per_token=output.per_token * weights)
