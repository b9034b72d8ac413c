"""A language model as the trainer sees it: a decoder, and a head that is applied without storing logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8
from rlhf_kernels.backend import choose
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.logprobs import LMHead, TokenScores, token_scores
from rlhf_lightning.models.activations import on_host
from rlhf_lightning.models.body import agree, body_states, check_packing, evaluating
from rlhf_lightning.models.branches import branch_states, check_branches
from rlhf_lightning.models.compiled import not_compiled
from rlhf_lightning.models.lora import is_adapted, is_adapted_layer, unwrapped
from rlhf_lightning.models.shared_prompts import group_states, pair_states
from rlhf_lightning.models.unpadded import check_unpadded, unpadded_states


class HasTokens(Protocol):
    """What a policy reads of a batch; `segments` and `kept` too where it has them."""

    tokens: Any
    attention_mask: Any
    mask: Any
    positions: Any


class Policy(nn.Module):
    """A causal language model that scores tokens and generates.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        padding_free: score batches without computing their padding; see `models.unpadded`.
        activation_offload: keep what the backward pass needs in host memory; see `models.activations`.
        logprobs: how log-probabilities are taken; see `ModelSpec`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        padding_free: bool = False,
        activation_offload: bool = False,
        logprobs: Literal["auto", "chunked", "fused"] = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.padding_free = padding_free
        self.activation_offload = activation_offload
        self.logprobs: Literal["auto", "chunked", "fused"] = logprobs
        self._packing_checked = False
        self._unpadded_checked = False
        self._branches_checked = False

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without the adapter's wrapper (its layers still hold the adapter)."""
        return unwrapped(self.model)

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.causal_lm.config

    @property
    def has_adapter(self) -> bool:
        """Whether low-rank adapters are trained instead of the weights."""
        return is_adapted(self.model)

    @property
    def body(self) -> nn.Module:
        """The decoder: everything but the output head."""
        return self.causal_lm.base_model

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch time"],
        attention_mask: Bool[Tensor, "batch time"],
        positions: Int[Tensor, "batch time"],
        segments: Int[Tensor, "batch time"] | None = None,
        *,
        answers: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        """Hidden states as the output head reads them. The head itself does not run.

        Args:
            positions: count from 0 at each record's first real token, whatever the padding side.
            segments: packed records 1, 2, ..., 0 on padding; no attention across records.
            answers: True on tokens of answers, of prompts that end at one column: a prompt that several rows begin with
                is computed once, where the model allows it and is not padding-free. The hidden states are the same.
        """
        if answers is not None and not self.padding_free:
            with on_host(self.model, self.activation_offload):
                states = group_states(self.body, tokens, attention_mask, positions, answers)
            if states is not None:
                return states
        if segments is not None and not self._packing_checked:
            check_packing(self.body, self.config.get_text_config().vocab_size)
            self._packing_checked = True
        self.check_padding_free()
        run = unpadded_states if self.padding_free else body_states
        with on_host(self.model, self.activation_offload):
            return run(self.body, tokens, attention_mask, positions, segments)

    def check_padding_free(self) -> None:
        """Raise, once, if batches are to be run without their padding and this model cannot."""
        if self.padding_free and not self._unpadded_checked:
            check_unpadded(self.body, self.config.get_text_config().vocab_size)
            self._unpadded_checked = True

    def shared_prompt_states(
        self,
        tokens: Int[Tensor, "rows time"],
        attention_mask: Bool[Tensor, "rows time"],
        positions: Int[Tensor, "rows time"],
        mask: Bool[Tensor, "rows time"],
    ) -> Float[Tensor, "rows time hidden"]:
        """`hidden_states` of pairs of rows, i and i + rows/2, whose common prompt is computed once.

        Completions attend to a cache of their prompt. Where that is longer than they are, the model fills none
        (gradient checkpointing, dropout, compiled layers), or the batch is run without its padding, a pair is one row.

        Args:
            mask: True on the completions.
        """
        if not self.padding_free:
            with on_host(self.model, self.activation_offload):
                states = pair_states(self.body, tokens, attention_mask, mask)
            if states is not None:
                return states
        if not self._branches_checked:
            vocab = self.config.get_text_config().vocab_size
            check_branches(self.body, vocab, padding_free=self.padding_free)
            self._branches_checked = True
        with on_host(self.model, self.activation_offload):
            return branch_states(self.body, tokens, attention_mask, positions, mask, padding_free=self.padding_free)

    def head(self) -> LMHead:
        """The output head with the current weights, and what the family does to its logits.

        Raises:
            UserError: the head has an adapter, which its weight alone would pass by.
        """
        linear: Any = self.causal_lm.get_output_embeddings()
        if is_adapted_layer(linear):
            raise UserError(
                "the output head has an adapter of its own, which would be passed by: leave the head out of the "
                "adapter's target_modules, or merge the adapter (merge_and_unload) before"
            )
        config = self.config.get_text_config()
        scale = getattr(config, "logit_scale", None)  # Cohere
        divisor = getattr(config, "logits_scaling", None)  # Granite
        shard = getattr(linear, "shard", None)  # of a `VocabParallelHead`
        weight, bias = (linear.weight, getattr(linear, "bias", None)) if shard is None else linear.local()
        return LMHead(
            weight=weight,
            bias=bias,
            shard=shard,
            logit_scale=(1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor)),
            softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
            method=self.logprobs,
        )

    def scores(
        self,
        hidden: Float[Tensor, "batch time hidden"],
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        kept: UInt8[Tensor, "batch time bytes"] | None = None,
    ) -> TokenScores:
        """Log-probability of every token that counts, from hidden states: see `core.logprobs.token_scores`.

        Raises:
            UserError: `logprobs: fused` where that kernel does not run.
        """
        head = self.head()
        if self.logprobs == "fused":
            check_fused(hidden, head.weight, truncated=kept is not None)
        return token_scores(hidden, tokens, mask, head, temperature=temperature, with_entropy=with_entropy, kept=kept)

    def forward(
        self,
        batch: HasTokens,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        answers: Bool[Tensor, "batch time"] | None = None,
    ) -> TokenScores:
        """Log-probability (and entropy) of every token of `batch` where `batch.mask`.

        Args:
            batch: a `TokenBatch`, `Generated` or `Rollouts`.
            temperature: logits are divided by it; the one that the tokens were sampled at.
            answers: see `hidden_states`.
        """
        # the class's own: of a sharded model `self.hidden_states` gathers weights and lets go of them, the head's too
        hidden = type(self).hidden_states(
            self, batch.tokens, batch.attention_mask, batch.positions, getattr(batch, "segments", None), answers=answers
        )
        return self.scores(
            hidden,
            batch.tokens,
            batch.mask,
            temperature=temperature,
            with_entropy=with_entropy,
            kept=getattr(batch, "kept", None),
        )

    def generate(self, **kwargs: Any) -> Any:
        """transformers' `generate`."""
        own = self.causal_lm.generation_config
        try:
            with not_compiled(self.model):
                return self.model.generate(**kwargs)
        finally:
            # peft lends the model its wrapper's generation config and does not take it back
            self.causal_lm.generation_config = own

    def next_logits(self, **kwargs: Any) -> tuple[Tensor, Any]:
        """Logits of the next token [rows, vocab] and the cache, from what transformers' forward takes."""
        with not_compiled(self.model):
            output = self.model(**kwargs, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], output.past_key_values

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """The model as it was before its adapter was trained."""
        assert is_adapted(self.model), "this policy has no adapter to switch off"
        with self.model.disable_adapter():
            yield


def check_fused(hidden: Tensor, weight: Tensor, *, truncated: bool) -> None:
    """Raise if log-probabilities of these cannot come from one kernel.

    Args:
        truncated: whether each token was drawn from a part of the vocabulary.
    """
    if truncated:
        raise UserError(
            "logprobs: fused is over the whole vocabulary, and these tokens were drawn from a part of it: generate "
            "without top_k, top_p and min_p, or use auto or chunked"
        )
    choice = choose(hidden)
    if choice.backend != "triton":
        raise UserError(f"logprobs: fused does not run here ({choice.reason}): use auto or chunked")
    if hidden.dtype != weight.dtype:
        raise UserError(
            f"logprobs: fused needs hidden states and head of one dtype, and they are {hidden.dtype} and "
            f"{weight.dtype}: store the model in the dtype it computes in (dtype: bfloat16), or use auto or chunked"
        )


def check_head(policy: Policy) -> None:
    """Raise if `policy.head()` is not what the model does itself between hidden states and logits.

    Families differ here (caps, scales, biases); one that we have not met must not be trained on wrong numbers.
    """
    vocab = policy.config.get_text_config().vocab_size
    name = policy.config.model_type
    if not isinstance(getattr(policy.causal_lm.get_output_embeddings(), "weight", None), Tensor):
        raise UserError(f"models of type {name!r} have no linear output head that could be applied token by token")
    tokens = torch.arange(4, device=policy.head().weight.device).unsqueeze(0) % vocab
    everything = torch.ones_like(tokens, dtype=torch.bool)
    with evaluating(policy), torch.no_grad():
        logits = policy.causal_lm(input_ids=tokens, attention_mask=everything, use_cache=False).logits.float()
        own = policy.scores(
            policy.hidden_states(tokens, everything, torch.arange(4, device=tokens.device).unsqueeze(0)),
            tokens,
            everything,
        ).logprobs[:, 1:]
    expected = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    tolerance = 1e-3 if policy.head().weight.dtype == torch.float32 else 5e-2
    if not agree(own, expected, tolerance, scale=max(1.0, float(logits.abs().max()))):
        raise UserError(
            f"models of type {name!r} treat their logits in a way that this version does not know: log-probabilities "
            "would be wrong. Please report the model type."
        )
