"""How much the entropy bonus weighs, from one optimiser step to the next."""

import math
from dataclasses import dataclass

from rlhf_lightning.core.errors import UserError


@dataclass(frozen=True)
class AdaptiveEntropy:
    """Steers the coefficient of the entropy bonus so that entropy does not fall below a target.

        coef   = min(coef + delta, max_coef)  if entropy <= target  else  max(coef - delta, min_coef)
        weight = coef                         if entropy <= target  else  0

    with the entropy of the optimiser step before. Pure: whoever trains keeps the coefficient, and saves it.
    TRL: `use_adaptive_entropy`, the same.

    Args:
        target: mean entropy of the policy over answer tokens (nats). Look at `policy/entropy` early in a run.
        delta: step of the coefficient.
        min_coef, max_coef: bounds of the coefficient.
    References:
        He et al., Skywork Open Reasoner 1 Technical Report, 2025. arXiv:2505.22312
    """

    target: float = 0.2
    delta: float = 0.005
    min_coef: float = 0.0
    max_coef: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("target", self.target), ("delta", self.delta)):
            if not 0 < value < math.inf:
                raise UserError(f"entropy_control.{name}={value} steers nothing: give a positive number")
        if not 0 <= self.min_coef < self.max_coef < math.inf:
            raise UserError(
                f"entropy_control.min_coef={self.min_coef} and max_coef={self.max_coef} leave no room for a "
                "coefficient: give 0 <= min_coef < max_coef"
            )

    def next_coef(self, coef: float, entropy: float) -> float:
        """The coefficient after an optimiser step with this mean entropy."""
        if entropy <= self.target:
            return min(coef + self.delta, self.max_coef)
        return max(coef - self.delta, self.min_coef)

    def weight(self, coef: float, entropy: float) -> float:
        """What the bonus weighs after a step with this mean entropy."""
        return coef if entropy <= self.target else 0.0


class EntropyBonus:
    """The coefficient of the entropy bonus during a run.

    Args:
        coef: the first one.
        control: what moves it; None: nothing.
    """

    def __init__(self, coef: float, control: AdaptiveEntropy | None) -> None:
        if control is not None and not control.min_coef <= coef <= control.max_coef:
            raise UserError(
                f"entropy_coef={coef} is where entropy_control begins, and outside its bounds: give "
                f"{control.min_coef} to {control.max_coef}"
            )
        self.coef = coef
        self.control = control
        self._entropy = math.inf
        """Of the step before: no bonus before the first was measured."""

    @property
    def enabled(self) -> bool:
        """Whether there is, or may be, a bonus."""
        return self.control is not None or self.coef != 0

    @property
    def weight(self) -> float:
        """What the bonus weighs in this step."""
        return self.coef if self.control is None else self.control.weight(self.coef, self._entropy)

    def observe(self, entropy: float) -> None:
        """Note the mean entropy of a step that was taken; of one that broke there is none."""
        if self.control is not None and math.isfinite(entropy):
            self.coef, self._entropy = self.control.next_coef(self.coef, entropy), entropy

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef, "entropy": self._entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef, self._entropy = state["coef"], state["entropy"]
