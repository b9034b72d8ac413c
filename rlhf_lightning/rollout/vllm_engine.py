"""vLLM in the process that trains: weights are handed over in memory, answers come back as tokens."""

import copy
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RolloutEngine
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.models.body import dropout_rates
from rlhf_lightning.models.handover import GivenBase, adapter_rank, adapter_weights, checkpoint_weights
from rlhf_lightning.rollout.answers import check_context, end_ids
from rlhf_lightning.rollout.engines import (
    Answer,
    assemble_answers,
    prompt_ids,
    refuse_options_of_batches,
    vllm_sampling,
)
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.rollout.vllm_adapters import (
    AdapterOption,
    adapter_request,
    check_adapter_option,
    room_for,
    take_adapter,
)

ENVIRONMENT = {
    # one process: weights are handed over as they lie in memory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # on the CPU vLLM would tie this process's threads to cores, those of the training too
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # nobody outside is asked, neither for our address nor to count us
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""What vLLM reads from the environment, where nobody has set it."""


@dataclass(frozen=True)
class _Options:
    adapter: AdapterOption
    dtype: str | None
    max_model_len: int | None
    max_num_seqs: int | None
    gpu_memory_utilization: float
    kv_cache_gib: float | None
    enforce_eager: bool | None
    sleep: bool


class VLLMEngine(RolloutEngine):
    """Answers from a vLLM that lives in this process and is given the policy's weights before a rollout.

    It says the log-probability of every token, over what was drawn from at the sampling temperature. Every answer has
    a seed of its own: the same seed, prompts and weights give the same answers as long as vLLM's arithmetic does not
    depend on what else is in flight (float32 on the CPU: seen; on a GPU it does unless vLLM is told otherwise).

    Args:
        spec: how to sample.
        tokenizer: for its pad and end ids and for stop strings.
        adapter: of a policy with `lora`. merged: added into the weights, all of which are handed over before every
            rollout; sent: the weights under it are handed over once, then the adapter alone.
        dtype: of vLLM's weights: float32, bfloat16 or float16; null: the policy's.
        max_model_len: longest prompt with its answer, in tokens; null: the model's context.
        max_num_seqs: answers in flight; null: vLLM's choice.
        gpu_memory_utilization: share of a GPU's memory for vLLM's weights and KV cache, beside what training needs.
        kv_cache_gib: size of the KV cache instead; null: what the share leaves; on the CPU 1.
        enforce_eager: neither compile nor capture CUDA graphs; null: on the CPU only.
        sleep: give the memory of weights and KV cache back while the policy trains; needs CUDA.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        tokenizer: PreTrainedTokenizerBase,
        adapter: AdapterOption = "merged",
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float | None = None,
        enforce_eager: bool | None = None,
        sleep: bool = False,
    ) -> None:
        refuse_options_of_batches(spec, type(self).__name__)
        vllm_sampling(spec, ())
        check_adapter_option(adapter)
        if adapter == "sent" and sleep:
            raise UserError(
                "engine.sleep=true drops the weights that engine.adapter='sent' hands over once: leave one of them out"
            )
        if not 0 < gpu_memory_utilization <= 1:
            raise UserError(
                f"engine.gpu_memory_utilization={gpu_memory_utilization}: give a share, above 0 and up to 1"
            )
        if kv_cache_gib is not None and not kv_cache_gib > 0:
            raise UserError(f"engine.kv_cache_gib={kv_cache_gib}: give a positive number of GiB, or null")
        self.spec = spec
        self.tokenizer = tokenizer
        options = _Options(
            adapter, dtype, max_model_len, max_num_seqs, gpu_memory_utilization, kv_cache_gib, enforce_eager, sleep
        )
        self._running = _Running(options, tokenizer, detokenize=bool(spec.stop_strings))
        self._beside_training = False
        """Whether the policy may be trained in another thread while answers are sampled."""

    def with_spec(self, spec: GenerationSpec) -> "VLLMEngine":
        other = copy.copy(self)
        other.spec = spec
        return other

    def ahead(self) -> "VLLMEngine":
        if self._running.options.sleep:
            raise UserError(
                "engine.sleep=true gives the memory of weights and KV cache back while the policy trains, and "
                "updates.async_rollouts=true samples then: leave one of them out"
            )
        other = copy.copy(self)
        other._beside_training = True
        return other

    def take_weights(self, policy: Any) -> None:
        if self._beside_training and any(getattr(part, name) for part, name in dropout_rates(policy)):
            raise UserError(
                "updates.async_rollouts=true with VLLMEngine, which draws from this process's generator as the "
                "policy's dropout does: set disable_dropout: true and lora.dropout: 0, or use VLLMServer"
            )
        self._running.take_weights(policy)

    def rest(self) -> None:
        self._running.rest()

    def close(self) -> None:
        self._running.close()

    @torch.no_grad()
    def generate(self, policy: Any, prompts: PromptBatch, *, seed: int) -> Generated:
        from vllm import SamplingParams

        check_context(self.spec, policy, prompts)
        if not self._running.has_weights:
            self._running.take_weights(policy)
        self._running.check_length(self.spec, prompts)
        ends = end_ids(policy, self.tokenizer)
        options = vllm_sampling(self.spec, ends)
        ids = [row for row in prompt_ids(prompts) for _ in range(self.spec.num_samples)]
        asked = [
            SamplingParams(
                **options,
                logprobs=0,
                flat_logprobs=True,
                detokenize=bool(self.spec.stop_strings),
                seed=counter_seed(seed, row),
            )
            for row in range(len(ids))
        ]
        # beside training nothing is put back: what another thread has drawn meanwhile would be drawn again. Answers
        # have seeds of their own, and what vLLM draws from the process's generator it throws away
        with nullcontext() if self._beside_training else _generators_seeded(seed):
            outputs = self._running.llm.generate(
                [{"prompt_token_ids": row} for row in ids], asked, use_tqdm=False, lora_request=self._running.adapter
            )
        return assemble_answers(
            self.spec,
            prompts,
            [_answer(output.outputs[0]) for output in outputs],
            pad_id=self.tokenizer.pad_token_id,
            ends=ends,
            vocab=policy.head().weight.shape[0],
        )


def _answer(output: Any) -> Answer:
    assert output.finish_reason in ("stop", "length"), f"vLLM ended an answer with {output.finish_reason!r}"
    return Answer(output.token_ids, output.logprobs.logprobs, output.finish_reason == "stop")


class _Running:
    """The vLLM behind one or more engines, started when it is first given weights."""

    def __init__(self, options: _Options, tokenizer: PreTrainedTokenizerBase, *, detokenize: bool) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.detokenize = detokenize
        self.has_weights = False
        self.llm: Any = None
        self.adapter: Any = None
        """What says that answers come from the adapter; None: they come from the weights alone."""
        self._base = GivenBase()
        self._adapters = 0
        self._asleep: list[str] = []
        """Whose memory is given back."""
        self._owns_group = False

    def take_weights(self, policy: Any) -> None:
        sent = adapter_weights(policy) if self.options.adapter == "sent" else {}
        weights = checkpoint_weights(policy, with_adapter=not sent)
        if self.llm is None:
            self._start(policy, adapter_rank(sent) if sent else 0)
        self.has_weights = False  # nor are there any if something goes wrong from here on
        self._wake("weights")
        with _process_as_it_was():
            if not sent or not self._base.is_of(policy):
                self._base.forget()
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
                self._base.give(policy)
            if sent:
                self._adapters += 1
                self.llm.collective_rpc(take_adapter, args=(self._adapters, sent))
                self.adapter = adapter_request(f"adapter-{self._adapters}", self._adapters)
        self._wake("kv_cache")
        # or prompts known from before are answered by the old weights
        self.llm.reset_prefix_cache(reset_running_requests=True)
        self.has_weights = True

    def rest(self) -> None:
        if self.options.sleep and self.has_weights:
            self.llm.sleep(level=2)
            self.has_weights, self._asleep = False, ["weights", "kv_cache"]

    def _wake(self, what: str) -> None:
        if what in self._asleep:
            self.llm.wake_up(tags=[what])
            self._asleep.remove(what)

    def close(self) -> None:
        if self.llm is None:
            return
        self.llm.llm_engine.engine_core.shutdown()
        self.llm, self.adapter = None, None
        self.has_weights, self._asleep = False, []
        self._base.forget()
        if self._owns_group:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def check_length(self, spec: GenerationSpec, prompts: PromptBatch) -> None:
        room = self.llm.llm_engine.vllm_config.model_config.max_model_len
        longest = int(prompts.attention_mask.sum(-1).max()) + spec.max_new_tokens
        if longest > room:
            raise UserError(
                f"engine.max_model_len={room}: a prompt with generation.max_new_tokens={spec.max_new_tokens} needs "
                f"{longest} tokens; raise it to that, or lower max_new_tokens or data.max_prompt_length"
            )

    def _start(self, policy: Any, rank: int) -> None:
        if find_spec("vllm") is None:
            raise UserError(
                "the engine VLLMEngine needs vLLM, which is not installed: docs/engines.md has the commands, for CUDA "
                "and for the CPU; or leave engine out"
            )
        in_group = torch.distributed.is_initialized()
        if in_group and torch.distributed.get_world_size() > 1:
            raise UserError(
                f"the engine VLLMEngine lives in one process, and {torch.distributed.get_world_size()} are training: "
                "start one server for all of them (make vllm-server) and use VLLMServer, or set trainer.devices: 1"
            )
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _process_as_it_was(), tempfile.TemporaryDirectory() as folder:
            from vllm import LLM
            from vllm.platforms import current_platform

            describe(policy, self.tokenizer, folder)
            self._owns_group = not in_group
            arguments = self._arguments(policy, rank, on_cpu=current_platform.is_cpu())
            try:
                self.llm = LLM(folder, **arguments)
            except Exception as error:
                raise UserError(
                    f"vLLM cannot be started with this policy ({type(policy.causal_lm).__name__}): {error}; change "
                    "the options of engine, or sample with HFGenerate"
                ) from error

    def _arguments(self, policy: Any, rank: int, *, on_cpu: bool) -> dict[str, Any]:
        options = self.options
        if options.sleep and on_cpu:
            raise UserError("engine.sleep=true gives back a GPU's memory, and this vLLM runs on the CPU: leave it out")
        gib = options.kv_cache_gib or (1.0 if on_cpu else None)
        arguments = {
            "load_format": "dummy",  # the weights are handed over
            "generation_config": "vllm",  # no sampling default of the model leaks in
            "skip_tokenizer_init": not self.detokenize,
            "dtype": options.dtype or str(policy.head().weight.dtype).removeprefix("torch."),
            "max_model_len": options.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if gib is None else int(gib * 2**30),
            "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
            "enable_sleep_mode": options.sleep,
            # at the temperature, over what is left to draw from
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "seed": 0,
            "enable_lora": rank > 0,
            "max_lora_rank": room_for(rank) if rank else None,
        }
        return {name: value for name, value in arguments.items() if value is not None}


def describe(policy: Any, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Write what vLLM builds the policy's architecture from: config and tokenizer, no weights."""
    config = copy.deepcopy(policy.config)
    config.architectures = [type(policy.causal_lm).__name__]
    if hasattr(config, "quantization_config"):  # weights of 4 bits are put back before they are handed over
        del config.quantization_config
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _generators_seeded(seed: int) -> Iterator[None]:
    with _process_as_it_was():
        torch.manual_seed(seed)
        yield


@contextmanager
def _process_as_it_was() -> Iterator[None]:
    """vLLM seeds every global generator as it starts, draws from them, and takes `torch.set_num_threads` away."""
    states = random.getstate(), np.random.get_state()
    set_num_threads = torch.set_num_threads
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_num_threads
