"""Exact token log-probabilities, whitening and GAE for RLHF; usable without any trainer."""

from rlhf_kernels.backend import backend_report
from rlhf_kernels.gae import gae
from rlhf_kernels.linear_token_logprobs import linear_token_logprobs
from rlhf_kernels.token_logprobs import TokenLogprobs, token_logprobs
from rlhf_kernels.whiten import masked_whiten

__all__ = ["TokenLogprobs", "backend_report", "gae", "linear_token_logprobs", "masked_whiten", "token_logprobs"]
