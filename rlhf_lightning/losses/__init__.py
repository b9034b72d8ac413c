"""Pure losses, per token or per comparison, and the frozen dataclasses that choose them in YAML."""

from rlhf_lightning.losses.divergence import AlphaDivergence, ChiSquaredKL, ForwardKL, JensenShannon, ReverseKL
from rlhf_lightning.losses.policy import ClippedSurrogate, clipped_surrogate
from rlhf_lightning.losses.preference import (
    DPO,
    IPO,
    DiscoPOP,
    EXOPair,
    Hinge,
    LengthNormalisedDPO,
    RobustDPO,
)
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
    "DPO",
    "IPO",
    "AlphaDivergence",
    "BradleyTerry",
    "ChiSquaredKL",
    "ClippedSurrogate",
    "ClippedValue",
    "DiscoPOP",
    "EXOPair",
    "ForwardKL",
    "Hinge",
    "JensenShannon",
    "LengthNormalisedDPO",
    "PlackettLuce",
    "Regression",
    "ReverseKL",
    "RobustDPO",
    "bradley_terry",
    "clipped_surrogate",
    "clipped_value",
    "plackett_luce",
    "regression",
    "token_nll",
]
