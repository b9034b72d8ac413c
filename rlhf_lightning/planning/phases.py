"""Runs what a stage does in a run, phase by phase, on tensors without numbers, and notes the memory."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import shapes_only
from rlhf_lightning.models.scalar_head import ValueHead
from rlhf_lightning.models.shared_prompts import Sharing, sharing
from rlhf_lightning.parallel.shard import decoder_layers, models_of
from rlhf_lightning.planning.shapes import Lengths, generated, tokens, training_batch
from rlhf_lightning.planning.stand_ins import experts_without_numbers, stand_in, without_numbers
from rlhf_lightning.planning.trace import MemoryTrace, Peak
from rlhf_lightning.rewards.readers import readers_of
from rlhf_lightning.rewards.scalar_reader import ScalarReader
from rlhf_lightning.rollout.decode import draw
from rlhf_lightning.rollout.frozen_copy import FrozenCopy
from rlhf_lightning.rollout.generate import HFGenerate

WEIGHTS, GRADIENTS, OPTIMISER, FROZEN, CACHE = "weights", "gradients", "optimiser", "frozen models", "KV cache"
FEW_BITS = "weights in few bits"
SHARDED = frozenset({WEIGHTS, GRADIENTS, OPTIMISER, FROZEN})
"""What is shared out over processes."""
GATHERED, BUCKETS, STEP = "gathered weights", "DDP buckets", "optimiser's step"
NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class Run:
    """What of the trainer's options decides about memory."""

    device: str = "cpu"
    """cpu or cuda."""
    precision: str = "32-true"
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    clip: float | None = None
    """Largest norm of the gradient."""
    strategy: str = "one"
    """one process, ddp or fsdp2."""
    processes: int = 1
    shards: int = 1
    """Processes that share one copy of the weights."""
    tensor_parallel: int = 1
    """Processes that share out the vocabulary of an output head."""
    reshards: bool = True
    """Whether a layer's weights are let go after its forward pass."""
    param_dtype: torch.dtype | None = None
    """What sharded weights are gathered in; None: their own dtype."""

    @property
    def autocast(self) -> Any:
        """The context that forward passes run in."""
        kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        dtype = kinds.get(self.precision)
        # as Lightning does: a weight is cast anew wherever it is used, and no cast outlives its use
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype, cache_enabled=False)


class Simulation:
    """A stage whose models have been built without weights, and its optimiser with its state.

    Args:
        module: the stage; copied, never built itself.
        run: the trainer's options.
        lengths: of its records.
        checkpointing: of activations; None: as the stage says.
        rollout: units of a rollout that is trained on in one piece, if it is; None: it is cut, or there is none.
    """

    def __init__(
        self,
        module: Any,
        run: Run,
        lengths: Lengths,
        *,
        checkpointing: bool | None = None,
        rollout: int | None = None,
    ) -> None:
        self.run, self.lengths, self.rollout = run, lengths, rollout
        self.module = copy.deepcopy(module)
        if checkpointing is not None:
            self.module.model_spec = replace(self.module.model_spec, gradient_checkpointing=checkpointing)
        self.trace = MemoryTrace(run.device, autocast=run.precision.endswith("mixed"))
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.notes = stand_in(self.module)
        with shapes_only(), torch.device("meta"):
            self.module.configure_model()
            for score in self.reward_models():
                score.to("meta")
        if not isinstance(getattr(self.module, "engine", None), HFGenerate | FrozenCopy | None):
            self.notes.append("generation is planned for the policy itself: what the engine holds comes on top of it")
        if run.tensor_parallel > 1:
            self.notes.append(
                f"tensor_parallel_size: {run.tensor_parallel} is planned as if each process computed all logits and "
                "gathered the head: it needs less"
            )
        with self._inside():
            self._build()

    # ---- building --------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        module = self.module
        module.trainer = SimpleNamespace(
            accumulate_grad_batches=self.run.accumulate,
            world_size=1,
            global_rank=0,
            global_step=0,
            num_training_batches=float("inf"),
            callbacks=[],
            precision_plugin=SimpleNamespace(forward_context=lambda: self.run.autocast),
        )
        self.models = list(models_of(module))
        own = self._bytes(module.parameters())
        known: dict[int, Tensor] = {}
        for model in (module, *module.frozen_models()):
            without_numbers(model, known, self.run.param_dtype)
        for score in self.reward_models():
            without_numbers(score.model, known, None)
        self.trace.label(_state(module), WEIGHTS)
        for model in (*module.frozen_models(), *(score.model for score in self.reward_models())):
            self.trace.label(_state(model), FROZEN)
        self._copy_for_sampling()
        self._count_few_bits()
        self._scale = own / self._bytes(module.parameters())
        """Bytes of weights as they are kept, per byte of them as they are computed with."""
        self._prepare_optimizer()
        module.splitter.more_follow = True  # nothing of what is logged matters

    def _copy_for_sampling(self) -> None:
        """What async_rollouts samples from while the policy is trained."""
        module = self.module
        engine = getattr(module, "engine", None)
        if isinstance(engine, FrozenCopy):
            engine.take_weights(module.policy)
            assert engine.policy is not None
            own = {id(x) for x in _state(module)}
            self.trace.label([x for x in _state(engine.policy) if id(x) not in own], FROZEN)
        if module.batch_format == "prompts" and module.updates.async_rollouts:
            self.notes.append(
                "answers are sampled while the policy is trained: on one device what generate holds beside weights and "
                "optimiser comes on top of train"
            )

    def _count_few_bits(self) -> None:
        """Of a quantised base the linear layers are held in few bits, and one at a time is put back to be used."""
        spec = self.module.model_spec.quantization
        self._bits = 0.0
        if spec is None:
            return
        # 4 bits: a scale of 32 bits per block of 64; doubly quantised 8 bits, and one of 32 for 256 of them
        scales = {False: 32 / 64, True: 8 / 64 + 32 / (64 * 256)}[bool(spec.double_quant)] if spec.bits == 4 else 0.0
        self._bits = spec.bits + scales
        head = self.models[0].causal_lm.get_output_embeddings() if hasattr(self.models[0], "causal_lm") else None
        for part in self.models[0].modules():
            if isinstance(part, nn.Linear) and part is not head and not part.weight.requires_grad:
                self.trace.label([part.weight], FEW_BITS)
                self._bit_size = part.weight.element_size() * 8
        self.notes.append("weights in few bits are counted by their format; putting one layer back takes some more")

    def _prepare_optimizer(self) -> None:
        groups = self.module.parameter_groups()
        self.trained = [p for group in groups for p in group["params"]]
        self.optimizer = self.module.optimizer(groups)
        largest = max(p.numel() * p.element_size() for p in self.trained)
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        try:
            self.optimizer.step()
            held = self.trace.now(), self._total()
            self.optimizer.step()
            self.step_factor = max(self.trace.peak(held[0], self.trace.now()).total - held[1], 0) / largest
        except (*NEEDS_NUMBERS, RuntimeError, TypeError) as error:
            name = type(self.optimizer).__name__
            raise UserError(
                f"plan cannot follow the optimiser {name} on tensors without numbers: give torch.optim.AdamW in its "
                f"place, whose state is seldom smaller ({str(error).splitlines()[0]})"
            ) from error
        for state in self.optimizer.state.values():
            self.trace.label([x for x in state.values() if isinstance(x, Tensor)], OPTIMISER)
        self.optimizer.zero_grad()

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients on one device."""
        return int(self._bytes(self.trained) * self._share(GRADIENTS))

    def _total(self) -> int:
        now = self.trace.now()
        return self.trace.peak(now, now).total

    def reward_models(self) -> list[ScalarReader]:
        """Models that score answers."""
        return [reader for reader, _ in readers_of(getattr(self.module, "rewards", ()))]

    # ---- phases ----------------------------------------------------------------------------------------------------

    def train(self, units: int) -> Peak:
        """Forward and backward of a micro-batch of so many units, and the optimiser's step."""

        def step() -> None:
            batch = training_batch(self.module, units, self.lengths)
            for _ in range(min(self.run.accumulate, 2)):  # the second one finds the gradients of the first
                with self.run.autocast, sharing(self._sharing(units)):
                    loss = self._loss(batch)
                loss.backward()
                del loss
                self.trace.label([p.grad for p in self.trained], GRADIENTS)
            if self.run.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.trained, self.run.clip)
            if self.run.device == "cuda":  # all parameters at once, where the CPU takes them one by one
                self.trace.hold(int(self.step_factor * self._bytes(self.trained)), STEP)
            self.optimizer.step()

        try:
            return self._phase(step, self._gathered_in_training())
        finally:
            self.optimizer.zero_grad()

    def _sharing(self, rows: int) -> Sharing:
        """How many answers to a prompt lie together: all of them where nothing is cut, else as few as may be."""
        whole = self.rollout is not None and rows >= self.rollout
        return Sharing(self.lengths.prompt, self.module.generation.num_samples if whole else 1)

    def _loss(self, batch: Any) -> Tensor:
        try:
            return self.module.training_step(batch, 0)
        except NEEDS_NUMBERS as error:
            name = type(self.module).__name__
            raise UserError(
                f"plan runs {name} on tensors without numbers, and its training step asks for one: {error}"
            ) from error

    def measure(self, units: int) -> Peak | None:
        """What is measured without gradient before training; None: nothing is.

        Args:
            units: of an on-policy stage answers at a time, else units of a micro-batch.
        """
        if self.module.batch_format == "prompts" and not hasattr(self.module, "values_of"):
            return None
        calls = self.trace.kernel_calls

        def run() -> None:
            self.module.eval()
            with torch.no_grad(), self.run.autocast, suppress(*NEEDS_NUMBERS):
                if self.module.batch_format == "prompts":
                    self._measure_answers(units)
                else:
                    # sums leave as numbers, which there are none of: by then all has been computed
                    self.module.measure_step([training_batch(self.module, units, self.lengths)])

        peak = self._phase(run, self._gathered_whole())
        self.module.train()
        return peak if self.trace.kernel_calls > calls else None

    def _measure_answers(self, rows: int) -> None:
        answers = generated(rows, self.lengths)
        with sharing(Sharing(self.lengths.prompt, self.module.generation.num_samples)):
            self.module._measure_policy(answers)
            self.module._measure_reference(answers)
            self.module.values_of(SimpleNamespace(answers=answers, baseline=None))

    def score(self, rows: int) -> Peak | None:
        """Reward models reading answers; None: there are none."""
        models = self.reward_models()
        if not models:
            return None

        def run() -> None:
            for score in models:
                length = min(score.max_length or self.lengths.row, self.lengths.row)
                with torch.no_grad():
                    score.model(tokens(min(score.batch_size, rows), length))

        gathered = sum(self._bytes(score.model.parameters()) for score in models) if self.run.shards > 1 else 0
        return self._phase(run, gathered)

    def generate(self, rows: int) -> Peak:
        """Prompts read, and the last token of the answers drawn, so many rows at a time."""

        def run() -> None:
            policy, lengths = self.module.policy, self.lengths
            self.module.eval()
            with torch.no_grad(), self.run.autocast:
                # our own loop reads a prompt once for all of its answers; a static cache is transformers' affair
                shared = self.module.generation.cache == "dynamic"
                copies = min(self.module.generation.num_samples, rows) if shared else 1
                _, cache = policy.next_logits(**_inputs(-(-rows // copies), lengths.prompt, lengths.prompt))
                cache.batch_select_indices(torch.arange(rows) // copies)
                self._fill(cache, lengths.row - 1)
                logits, cache = policy.next_logits(**_inputs(rows, 1, lengths.row), past_key_values=cache)
                scores = logits.float() / 2
                if self.module.generation.top_p < 1:
                    scores, _ = scores.sort()
                probs = scores.log_softmax(-1).exp()
                draw(probs, torch.zeros(rows))

        peak = self._phase(run, self._gathered_whole())
        self.module.train()
        return peak

    def _fill(self, cache: Any, length: int) -> None:
        """Let the cache hold so many tokens."""
        for layer in cache.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name, None)
                if isinstance(held, Tensor) and held.dim() == 4:
                    grown = held.new_empty((*held.shape[:2], min(length, _window(layer, length)), held.shape[3]))
                    setattr(layer, name, grown)
                    self.trace.label([grown], CACHE)

    def _phase(self, run: Callable[[], None], gathered: int) -> Peak:
        with self._inside():
            start = self.trace.now()
            run()
            peak = self.trace.peak(start, self.trace.now(), self._share)
        fixed = {GATHERED: gathered, BUCKETS: self._bytes(self.trained) if self.run.strategy == "ddp" else 0}
        fixed = {name: size for name, size in fixed.items() if size}
        return Peak(peak.total + sum(fixed.values()), {**peak.parts, **fixed})

    # ---- several processes -----------------------------------------------------------------------------------------

    def _share(self, name: str) -> float:
        """How much of what the trace has seen lies on one device."""
        if name == FEW_BITS:
            return self._bits / self._bit_size
        if name not in SHARDED:
            return 1.0
        return (self._scale if name != FROZEN else 1.0) / self.run.shards

    def _gathered_in_training(self) -> int:
        """Embedding and head of every model, and of its layers the one in use and the next; or all."""
        if self.run.shards == 1:
            return 0
        if not self.run.reshards:
            return self._gathered_whole()
        gathered = 0
        for model in (*self.models, *self.module.frozen_models()):
            layers = [self._bytes(layer.parameters()) for layer in decoder_layers(model)]
            gathered += self._bytes(model.parameters()) - sum(layers) + 2 * max(layers, default=0)
        return gathered

    def _gathered_whole(self) -> int:
        """Every weight of the largest model."""
        if self.run.shards == 1:
            return 0
        return max(self._bytes(model.parameters()) for model in self.models if not isinstance(model, ValueHead))

    @staticmethod
    def _bytes(tensors: Any) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(experts_without_numbers())
            stack.enter_context(self._fake)
            stack.enter_context(self.trace)
            yield


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _inputs(rows: int, new: int, length: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.zeros((rows, new), dtype=torch.long),
        "attention_mask": torch.ones((rows, length), dtype=torch.long),
    }


def _window(layer: Any, length: int) -> int:
    window = getattr(layer, "sliding_window", None)
    return window if isinstance(window, int) else length
