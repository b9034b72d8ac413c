"""What a user may plug in. Abstract here, final elsewhere; chosen in YAML by `class_path`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.core.batches import Batch, Generated, PromptBatch

BatchFormat = Literal["tokens", "pairs", "ranked", "rated", "unpaired", "steps", "prompts"]
"""What a stage wants to be fed; the datamodule reads and collates accordingly."""


@dataclass(frozen=True)
class PolicyLossOutput:
    """A policy loss per token and what happened inside it."""

    per_token: Float[Tensor, "batch time"]
    """The loss, not yet masked or averaged."""
    ratio: Float[Tensor, "batch time"]
    """exp(logprobs - old_logprobs), no gradient."""
    clipped: Bool[Tensor, "batch time"]
    """True where the bound cut the gradient off."""


class PolicyLoss(ABC):
    """The policy's loss, per token, from log-probabilities and advantages."""

    @abstractmethod
    def __call__(
        self,
        logprobs: Float[Tensor, "batch time"],
        old_logprobs: Float[Tensor, "batch time"],
        advantages: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> PolicyLossOutput: ...


class ValueLoss(ABC):
    """The critic's loss, per token."""

    @abstractmethod
    def __call__(
        self,
        values: Float[Tensor, "batch time"],
        old_values: Float[Tensor, "batch time"],
        returns: Float[Tensor, "batch time"],
    ) -> tuple[Float[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
        """Loss per token, and True where clipping decided it."""


NO_BREAKDOWN: Mapping[str, Tensor] = MappingProxyType({})
"""There is nothing to tell reward functions apart by."""


def on_one_rank(x: Tensor) -> Tensor:
    """The sum over ranks where there is only one."""
    return x


class Credit(ABC):
    """Turns rewards (and values) into advantages and returns."""

    needs_groups: ClassVar[bool] = False
    """Whether an answer is judged against others to the same prompt: one answer per prompt then teaches nothing."""
    baseline: ClassVar[Literal["none", "critic", "greedy"]] = "none"
    """What `values` holds. none: zeros; critic: its estimate of what is to come; greedy: the rewards of the greedy
    answer to the same prompt, spread over the tokens so that they sum to its score."""

    @abstractmethod
    def __call__(
        self,
        rewards: Float[Tensor, "batch time"],
        values: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        groups: Int[Tensor, " batch"],
        *,
        breakdown: Mapping[str, Float[Tensor, " batch"]] = NO_BREAKDOWN,
        add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
        """Advantages and returns, both 0 where `mask` is False.

        Args:
            rewards: of each token, after shaping; those of a sequence sum to its score (minus KL).
            values: see `baseline`.
            mask: True on the tokens of the answers.
            groups: names the prompt that each sequence answers; groups may differ in size.
            breakdown: score of each sequence from each reward function, already weighted, before shaping.
            add_over_ranks: adds a tensor over all ranks, where there are several.
        """


@dataclass(frozen=True)
class RewardLossOutput:
    """A reward model's loss, one number per element (pair, prompt or rating), not yet averaged."""

    per_element: Float[Tensor, " elements"]
    accuracy: Float[Tensor, " elements"]
    """Share of the element's comparisons that the scores get right; ties count half."""
    margin: Float[Tensor, " elements"]
    """Mean difference of score between better and worse."""


@dataclass(frozen=True)
class Sample:
    """One answer, as a reward function sees it."""

    prompt: str
    """As the model read it, special tokens left out."""
    completion: str
    """The decoded answer, special tokens left out."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The prompt's whole record: the answer key, the category, whatever columns the data had."""
    tokens: Sequence[int] = ()
    """Ids of the answer, end token included."""
    finished: bool = True
    """Whether the answer ended by itself (end token or stop string) rather than at the length limit."""


class RewardLoss(ABC):
    """A reward model's loss, from the scores of all completions of a batch."""

    batch_format: ClassVar[BatchFormat]
    """What the records must be for this loss."""
    denominator: ClassVar[str]
    """What the loss averages over, by its name in the batch's totals: pairs, prompts or sequences."""

    @abstractmethod
    def __call__(self, scores: Float[Tensor, " completions"], batch: Batch) -> RewardLossOutput:
        """`scores` in the order of `batch`: of pairs all chosen, then all rejected; else as the completions stand."""


Scores = Sequence[float] | Sequence[Sequence[float]]


class RewardFn(ABC):
    """Scores answers: one number per sample, or one number per token of each sample."""

    name: str = ""
    """What the metrics call it; the class name if empty."""

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Scores: ...

    def to(self, device: torch.device | str) -> None:
        """Move whatever the function computes with. Nothing, unless it holds a model."""
        return None


class RolloutEngine(ABC):
    """Samples answers to prompts from a policy."""

    @abstractmethod
    def generate(self, policy: Any, prompts: PromptBatch, *, seed: int) -> Generated:
        """Every prompt answered `num_samples` times, answers to one prompt side by side.

        Args:
            policy: what is sampled from, a `models.policy.Policy`.
            seed: names this draw; the same seed, prompts and weights give the same answers.
        """
