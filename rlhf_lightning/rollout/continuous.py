"""Answers from transformers' continuous batching: a paged KV cache, a new request wherever another one ended."""

from dataclasses import fields
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RolloutEngine
from rlhf_lightning.models.sharded import is_sharded
from rlhf_lightning.rollout.answers import check_context, end_ids
from rlhf_lightning.rollout.engines import Answer, assemble_answers, prompt_ids, refuse_options_of_batches
from rlhf_lightning.rollout.spec import GenerationSpec

CPU_BATCH_TOKENS = 512
"""Tokens of a forward pass on the CPU, where transformers' own choice takes minutes to set up."""
PAGE_SIZE = "page_size" if "page_size" in {f.name for f in fields(ContinuousBatchingConfig)} else "block_size"
"""What the config calls it: the other name up to transformers 5.17."""


class HFContinuousBatching(RolloutEngine):
    """`generate_batch` of transformers on the policy's own weights: made for CUDA; on the CPU it works, slowly.

    It says the log-probability of every token, over what was drawn from at the sampling temperature. Draws come from
    one generator in the order in which requests are served, and that order is a background thread's.

    Args:
        spec: how to sample.
        tokenizer: for its pad and end ids.
        cache_memory_frac: share of the free GPU memory that the KV cache takes.
        page_size: tokens in a page of it.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        tokenizer: PreTrainedTokenizerBase,
        cache_memory_frac: float = 0.5,
        page_size: int = 256,
    ) -> None:
        name = type(self).__name__
        refuse_options_of_batches(spec, name)
        plain = GenerationSpec()
        for option in ("stop_strings", "min_new_tokens", "min_p", "repetition_penalty", "suppress_tokens"):
            value = getattr(spec, option)
            if value != getattr(plain, option):
                raise UserError(f"generation.{option}={value} is not known to {name}: leave it out, or use HFGenerate")
        if not 0 < cache_memory_frac <= 1:
            raise UserError(f"engine.cache_memory_frac={cache_memory_frac}: give a share, above 0 and up to 1")
        if page_size < 4:
            raise UserError(f"engine.page_size={page_size}: give at least 4 tokens")
        self.spec = spec
        self.tokenizer = tokenizer
        self.cache_memory_frac = cache_memory_frac
        self.page_size = page_size

    def with_spec(self, spec: GenerationSpec) -> "HFContinuousBatching":
        return HFContinuousBatching(spec, self.tokenizer, self.cache_memory_frac, self.page_size)

    def ahead(self) -> RolloutEngine:
        raise UserError(
            "updates.async_rollouts=true with HFContinuousBatching, whose answers depend on when a thread of its own "
            "serves a request, and whose cache takes a share of the memory that training leaves free: use VLLMServer, "
            "VLLMEngine or HFGenerate, or leave async_rollouts out"
        )

    @torch.no_grad()
    def generate(self, policy: Any, prompts: PromptBatch, *, seed: int) -> Generated:
        check_context(self.spec, policy, prompts)
        _refuse_several(policy)
        ends = end_ids(policy, self.tokenizer)
        ids = [row for row in prompt_ids(prompts) for _ in range(self.spec.num_samples)]
        device = prompts.tokens.device
        model, config = policy.causal_lm, self._sampling(ends)
        own, was_training = model.generation_config, policy.training
        policy.eval()
        # what `config` leaves open would be filled in from the model's own
        model.generation_config = config
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                outputs = model.generate_batch(
                    ids,
                    generation_config=config,
                    continuous_batching_config=self._batching(ids, seed, on_cpu=device.type == "cpu"),
                    warmup=False,
                )
        finally:
            model.generation_config = own
            policy.train(was_training)
        failed = next((output.error for output in outputs.values() if output.error is not None), None)
        if failed is not None or len(outputs) != len(ids):
            raise UserError(
                f"transformers' continuous batching gave {len(outputs)} of {len(ids)} answers ({failed or 'see above'})"
                ": lower engine.cache_memory_frac or data.batch_size, or use HFGenerate"
            )
        answers = [
            Answer(output.generated_tokens, output.logprobs, output.generated_tokens[-1] in ends)
            for output in outputs.values()
        ]
        return assemble_answers(
            self.spec,
            prompts,
            answers,
            pad_id=self.tokenizer.pad_token_id,
            ends=ends,
            vocab=policy.head().weight.shape[0],
        )

    def _sampling(self, ends: list[int]) -> GenerationConfig:
        spec = self.spec
        sampling = (
            {"do_sample": False}
            if spec.temperature == 0
            else {"do_sample": True, "temperature": spec.temperature, "top_p": spec.top_p, "top_k": spec.top_k}
        )
        return GenerationConfig(
            max_new_tokens=spec.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            **sampling,
        )

    def _batching(self, ids: list[list[int]], seed: int, *, on_cpu: bool) -> ContinuousBatchingConfig:
        common: dict[str, Any] = {
            PAGE_SIZE: self.page_size,
            "return_logprobs": True,
            "seed": seed,
            "drop_unsupported_processors": False,
        }
        if not on_cpu:
            return ContinuousBatchingConfig(max_memory_percent=self.cache_memory_frac, **common)
        pages = sum(-(-(len(row) + self.spec.max_new_tokens) // self.page_size) for row in ids)
        return ContinuousBatchingConfig(num_blocks=pages + 1, max_batch_tokens=CPU_BATCH_TOKENS, **common)


def _refuse_several(policy: Any) -> None:
    if is_sharded(policy):
        raise UserError(
            "trainer.strategy shares the policy's weights out over processes, which HFContinuousBatching cannot "
            "gather: use strategy ddp with VLLMServer, or HFGenerate"
        )
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UserError(
            "HFContinuousBatching would take the processes that train for parts of one model: use HFGenerate, or "
            "set trainer.devices: 1"
        )
