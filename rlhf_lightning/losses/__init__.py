"""Pure losses, per token or per comparison, and the frozen dataclasses that choose them in YAML."""

from rlhf_lightning.losses.policy import ClippedSurrogate, clipped_surrogate
from rlhf_lightning.losses.reward_model import (
    BradleyTerry,
    PlackettLuce,
    Regression,
    bradley_terry,
    plackett_luce,
    regression,
)
from rlhf_lightning.losses.supervised import token_nll
from rlhf_lightning.losses.value import ClippedValue, clipped_value

__all__ = [
    "BradleyTerry",
    "ClippedSurrogate",
    "ClippedValue",
    "PlackettLuce",
    "Regression",
    "bradley_terry",
    "clipped_surrogate",
    "clipped_value",
    "plackett_luce",
    "regression",
    "token_nll",
]
