"""Exact, fused log-probabilities, KL, policy loss and GAE for RLHF; usable without any trainer."""

from rlhf_kernels.backend import BackendChoice, backend_report
from rlhf_kernels.exact_kl import exact_kl
from rlhf_kernels.gae import ShapedGae, gae, kl_shaped_gae
from rlhf_kernels.linear_exact_kl import linear_exact_kl
from rlhf_kernels.linear_jsd import linear_jsd
from rlhf_kernels.linear_policy_loss import linear_policy_loss
from rlhf_kernels.linear_token_logprobs import linear_token_logprobs
from rlhf_kernels.policy_loss import policy_loss
from rlhf_kernels.spec import PolicyLossOutput, PolicyLossSpec, policy_terms
from rlhf_kernels.token_logprobs import TokenLogprobs, token_logprobs
from rlhf_kernels.vocab_shard import VocabShard
from rlhf_kernels.whiten import masked_whiten

__all__ = [
    "BackendChoice",
    "PolicyLossOutput",
    "PolicyLossSpec",
    "ShapedGae",
    "TokenLogprobs",
    "VocabShard",
    "backend_report",
    "exact_kl",
    "gae",
    "kl_shaped_gae",
    "linear_exact_kl",
    "linear_jsd",
    "linear_policy_loss",
    "linear_token_logprobs",
    "masked_whiten",
    "policy_loss",
    "policy_terms",
    "token_logprobs",
]
