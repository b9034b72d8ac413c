"""Pure losses, per token or per comparison, and the frozen dataclasses that choose them in YAML."""

from rlhf_lightning.losses.correction import (
    CorrectionOutput,
    SamplerCorrection,
    SamplerFilter,
    off_policy_sequence_mask,
)
from rlhf_lightning.losses.distillation import Distillation, TeacherLoss
from rlhf_lightning.losses.divergence import AlphaDivergence, ChiSquaredKL, ForwardKL, JensenShannon, ReverseKL
from rlhf_lightning.losses.entropy import top_entropy_mask
from rlhf_lightning.losses.entropy_control import AdaptiveEntropy
from rlhf_lightning.losses.policy import Cispo, ClippedSurrogate, Gspo, Reinforce, Sapo, clipped_surrogate
from rlhf_lightning.losses.policy_corrected import Corrected
from rlhf_lightning.losses.policy_covariance import ClipCov, KlCov
from rlhf_lightning.losses.policy_divergence import Dppo
from rlhf_lightning.losses.policy_quadratic import Dro
from rlhf_lightning.losses.policy_sequence import Gmpo, Vespo
from rlhf_lightning.losses.preference import (
    DPO,
    IPO,
    DiscoPOP,
    EXOPair,
    Hinge,
    LengthNormalisedDPO,
    RobustDPO,
)
from rlhf_lightning.losses.preference_batch import AOT, AOTUnpaired, BetaDPO
from rlhf_lightning.losses.preference_free import CPO, ORPO, AlphaPO, ChosenNLL, SimPO
from rlhf_lightning.losses.preference_guarded import DPOP, TDPO, ChiPO
from rlhf_lightning.losses.preference_length import LDDPO, RDPO
from rlhf_lightning.losses.preference_mixed import RPO, TPO, WPO, WeightedLoss, WeightedLosses
from rlhf_lightning.losses.preference_online import XPO, NashMD
from rlhf_lightning.losses.preference_pointwise import APODown, APOZero, BCOPair, NCAPair, SPPOHard
from rlhf_lightning.losses.preference_ranked import ListwiseDPO
from rlhf_lightning.losses.reward_model import (
    BradleyTerry,
    PlackettLuce,
    Regression,
    StepCorrectness,
    bradley_terry,
    plackett_luce,
    regression,
    step_correctness,
)
from rlhf_lightning.losses.supervised import DFT, NLL, SupervisedLoss, TokenLoss, dynamic_nll, token_nll
from rlhf_lightning.losses.unpaired import BCO, KTO, APOZeroUnpaired, apo_zero_unpaired, bco, kto
from rlhf_lightning.losses.value import ClippedValue, clipped_value

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DFT",
    "DPO",
    "DPOP",
    "IPO",
    "KTO",
    "LDDPO",
    "NLL",
    "ORPO",
    "RDPO",
    "RPO",
    "TDPO",
    "TPO",
    "WPO",
    "XPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "APOZeroUnpaired",
    "AdaptiveEntropy",
    "AlphaDivergence",
    "AlphaPO",
    "BCOPair",
    "BetaDPO",
    "BradleyTerry",
    "ChiPO",
    "ChiSquaredKL",
    "ChosenNLL",
    "Cispo",
    "ClipCov",
    "ClippedSurrogate",
    "ClippedValue",
    "Corrected",
    "CorrectionOutput",
    "DiscoPOP",
    "Distillation",
    "Dppo",
    "Dro",
    "EXOPair",
    "ForwardKL",
    "Gmpo",
    "Gspo",
    "Hinge",
    "JensenShannon",
    "KlCov",
    "LengthNormalisedDPO",
    "ListwiseDPO",
    "NCAPair",
    "NashMD",
    "PlackettLuce",
    "Regression",
    "Reinforce",
    "ReverseKL",
    "RobustDPO",
    "SPPOHard",
    "SamplerCorrection",
    "SamplerFilter",
    "Sapo",
    "SimPO",
    "StepCorrectness",
    "SupervisedLoss",
    "TeacherLoss",
    "TokenLoss",
    "Vespo",
    "WeightedLoss",
    "WeightedLosses",
    "apo_zero_unpaired",
    "bco",
    "bradley_terry",
    "clipped_surrogate",
    "clipped_value",
    "dynamic_nll",
    "kto",
    "off_policy_sequence_mask",
    "plackett_luce",
    "regression",
    "step_correctness",
    "token_nll",
    "top_entropy_mask",
]
