"""What a user may plug in. Abstract here, final elsewhere; chosen in YAML by `class_path`."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.core.batches import Batch, Generated, PromptBatch
from rlhf_lightning.core.errors import UserError

BatchFormat = Literal["tokens", "pairs", "triples", "ranked", "rated", "unpaired", "mismatched", "steps", "prompts"]
"""What a stage wants to be fed; the datamodule reads and collates accordingly. `triples` is `pairs`, and a gold answer
to each prompt; `mismatched` is `unpaired`, and each prompt a second time with a completion that belongs to another
one."""


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

    @property
    def whole_batch(self) -> bool:
        """Whether its value depends on which sequences share a micro-batch."""
        return False

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


CreditBaseline = Literal["none", "critic", "greedy", "variance"]
"""What a credit compares with."""


class Credit(ABC):
    """Turns rewards (and values) into advantages and returns."""

    needs_groups: ClassVar[bool] = False
    """Whether an answer is judged against others to the same prompt: one answer per prompt then teaches nothing."""
    baseline: ClassVar[CreditBaseline] = "none"
    """What `values` holds. none: zeros; critic: its estimate of what is to come; greedy: the rewards of the greedy
    answer to the same prompt, spread over the tokens so that they sum to its score; variance: 1 - 2 pi(token) +
    sum_v pi(v)^2, the squared gradient of the token's log-probability with respect to the logits, times the square of
    the weight that `correction` gives the token."""

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
    """A reward model's loss, one number per element (pair, prompt, rating or step), not yet averaged."""

    per_element: Float[Tensor, "*elements"]
    accuracy: Float[Tensor, "*elements"]
    """Share of the element's comparisons that the scores get right; ties count half."""
    margin: Float[Tensor, "*elements"]
    """Mean difference of score between better and worse; of a step, how far its score is on the right side of 0."""


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
    """A reward model's loss, from the scores of all completions (or of their steps) of a batch."""

    batch_format: ClassVar[BatchFormat]
    """What the records must be for this loss."""
    denominator: ClassVar[str]
    """What the loss averages over, by its name in the batch's totals: pairs, prompts, sequences or steps."""

    @abstractmethod
    def __call__(self, scores: Float[Tensor, " completions"], batch: Batch) -> RewardLossOutput:
        """`scores` in the order of `batch`: of pairs all chosen, then all rejected; of steps at every token
        [batch time], the output then being 0 where the batch's mask is False; else as the completions stand."""


@dataclass(frozen=True)
class CompletionScores:
    """What policy and reference say about completions, one row each; every per-token number is 0 off `mask`."""

    logprobs: Float[Tensor, "rows time"]
    """Log-probability of each completion token under the policy being trained (nats)."""
    mask: Bool[Tensor, "rows time"]
    """True on the completion's tokens, its end token included."""
    ref_logprobs: Float[Tensor, "rows time"] | None = None
    """The same under the frozen reference; None: there is none. No gradient."""
    ref_kl: Float[Tensor, "rows time"] | None = None
    """KL(reference || policy) of the distribution that each token was drawn from, exact; None: not asked for."""
    log_collision: Float[Tensor, "rows time"] | None = None
    """log sum_v pi(v)^2 of that distribution under the policy, no gradient; None: not asked for."""

    @property
    def total(self) -> Float[Tensor, " rows"]:
        """log pi(y|x): the sum over the completion's tokens."""
        return self.logprobs.sum(-1)

    @property
    def lengths(self) -> Float[Tensor, " rows"]:
        """Tokens of each completion, at least 1."""
        return self.mask.sum(-1).clamp(min=1).to(self.logprobs.dtype)

    @property
    def mean(self) -> Float[Tensor, " rows"]:
        """log pi(y|x) / |y|: the mean over the completion's tokens."""
        return self.total / self.lengths

    @property
    def log_ratio(self) -> Float[Tensor, " rows"]:
        """log pi(y|x) - log pi_ref(y|x).

        Raises:
            UserError: there is no reference.
        """
        return self.total - self.ref_total

    @property
    def ref_total(self) -> Float[Tensor, " rows"]:
        """log pi_ref(y|x).

        Raises:
            UserError: there is no reference.
        """
        if self.ref_logprobs is None:
            raise UserError(
                "this preference loss compares the policy with a reference, and there is none: give a reference, or a "
                "loss that needs none, such as SimPO, AlphaPO, CPO or ORPO"
            )
        return self.ref_logprobs.sum(-1)

    def weighted(self, weights: Float[Tensor, "rows time"]) -> "CompletionScores":
        """Every token's log-probabilities times a weight."""
        ref = None if self.ref_logprobs is None else self.ref_logprobs * weights
        return replace(self, logprobs=self.logprobs * weights, ref_logprobs=ref)


@dataclass(frozen=True)
class PairScores:
    """What a preference loss reads: row i of `chosen` was preferred to row i of `rejected`."""

    chosen: CompletionScores
    rejected: CompletionScores
    margins: Float[Tensor, " pairs"] | None = None
    """The records' `margin` column: by how much chosen should win; None: they have none."""
    running: Mapping[str, float | Tensor] = field(default_factory=dict)
    """Running means that the loss keeps (`running_means`), over the optimiser steps before this one; 0 at first."""
    step: Mapping[str, float | Tensor] = field(default_factory=dict)
    """Means that the loss asked for (`step_means`), over the whole optimiser step that these pairs belong to."""
    own: Bool[Tensor, "pairs 2"] | None = None
    """Of sampled pairs: True where the policy itself drew the answer (chosen, rejected); None: nobody knows."""
    gold: CompletionScores | None = None
    """A third answer to each prompt, better than both, under the policy alone; None: not asked for."""

    @property
    def log_ratio(self) -> Float[Tensor, " pairs"]:
        """h = log pi(yw)/pi_ref(yw) - log pi(yl)/pi_ref(yl)."""
        return self.chosen.log_ratio - self.rejected.log_ratio

    def with_completions(self, chosen: CompletionScores, rejected: CompletionScores) -> "PairScores":
        """The same pairs, scored otherwise."""
        return replace(self, chosen=chosen, rejected=rejected)


@dataclass(frozen=True)
class PreferenceLossOutput:
    """A preference loss per pair, not yet averaged, and the rewards that it implies."""

    per_pair: Float[Tensor, " pairs"]
    """Averaged over the pairs of the whole optimiser step."""
    chosen_rewards: Float[Tensor, " pairs"]
    """The reward that the loss takes the policy to express, such as beta log pi/pi_ref; no gradient."""
    rejected_rewards: Float[Tensor, " pairs"]
    per_chosen_token: Float[Tensor, "pairs time"] | None = None
    """A second term, 0 off the mask: averaged over the chosen tokens of the whole optimiser step. None: no such."""
    per_gold_token: Float[Tensor, "pairs gold_time"] | None = None
    """A third term, likewise, over the gold tokens."""
    statistics: Mapping[str, Float[Tensor, " pairs"]] = field(default_factory=dict)
    """Numbers whose means the loss wants back: over steps in `PairScores.running`, over this step in `.step`."""


Need = Literal["reference", "ref_kl", "log_collision", "opponent", "whole_batch", "drawn_pairs", "gold"]
"""What a preference loss reads beyond the policy's own log-probabilities; `opponent`: pairs of an answer that the
policy drew and one that it did not; `whole_batch`: its value depends on which pairs share a micro-batch; `drawn_pairs`:
a part of each step's pairs is drawn, and the others are left out; `gold`: a third answer to each prompt."""


class AnyPreferenceLoss(ABC):
    """A loss on completions of one prompt that are preferred to one another: pairs, or rankings."""

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be measured for this loss."""
        return frozenset({"reference"})

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class PreferenceLoss(AnyPreferenceLoss):
    """A loss on pairs of completions of one prompt, from their log-probabilities."""

    @property
    def running_means(self) -> Mapping[str, float]:
        """Running means that it keeps, each with its decay d: mean <- d mean + (1 - d) mean of the step."""
        return {}

    @property
    def step_means(self) -> frozenset[str]:
        """Those of its statistics whose mean over the whole optimiser step it reads, which costs one more forward."""
        return frozenset()

    @property
    def keep_frac(self) -> float:
        """Share of each optimiser step's pairs that it is averaged over; below 1 it needs `drawn_pairs`."""
        return 1.0

    def log_weights(
        self, margins: Float[Tensor, " pairs"], running: Mapping[str, float | Tensor]
    ) -> Float[Tensor, " pairs"]:
        """How readily each pair of a step is drawn: the logarithm of a weight, of which a common factor may be missing.

        Args:
            margins: its statistic `margin`, of all pairs of the step over micro-batches and ranks.
            running: its running means, over the steps before.
        """
        return torch.zeros_like(margins)

    @abstractmethod
    def __call__(self, pairs: PairScores) -> PreferenceLossOutput: ...


@dataclass(frozen=True)
class RankedPreferenceLossOutput:
    """A listwise preference loss per prompt, not yet averaged."""

    per_prompt: Float[Tensor, " prompts"]
    rewards: Float[Tensor, " completions"]
    """The reward that the loss takes the policy to express; no gradient."""
    accuracy: Float[Tensor, " prompts"]
    """Share of the prompt's comparisons that the rewards get right; ties count half."""
    margin: Float[Tensor, " prompts"]
    """Mean difference of reward between better and worse; no gradient."""


class RankedPreferenceLoss(AnyPreferenceLoss):
    """A loss on K >= 2 ranked completions of each prompt."""

    @abstractmethod
    def __call__(
        self,
        completions: CompletionScores,
        groups: Int[Tensor, " completions"],
        ranks: Float[Tensor, " completions"],
    ) -> RankedPreferenceLossOutput:
        """`groups` names the prompt that each completion answers, `ranks` its place there, 1 = best."""


Baseline = Literal["none", "mismatched_kl", "mean_reward"]
"""What an unpaired loss compares a completion with: nothing; the policy's distance to its reference, estimated on
prompts with other prompts' completions; or the mean reward over the optimiser steps before the present one."""


class UnpairedLoss(ABC):
    """A loss on single completions, each called desirable or not."""

    baseline: ClassVar[Baseline]
    """What the stage has to measure for it."""
    beta: float
    """Factor from log-ratio to the reward that the policy implies: reward = beta (log pi(y|x) - log pi_ref(y|x))."""

    @property
    def balanced_baseline(self) -> bool:
        """Of a mean reward: half-way between the means of desirable and undesirable completions, not that of all."""
        return False

    @abstractmethod
    def __call__(
        self,
        log_ratios: Float[Tensor, " completions"],
        labels: Bool[Tensor, " completions"],
        baseline: Float[Tensor, ""],
    ) -> Float[Tensor, " completions"]:
        """Loss per completion.

        Args:
            log_ratios: log pi(y|x) - log pi_ref(y|x), summed over the completion's tokens.
            labels: True = desirable.
            baseline: what was asked for in `baseline`, over the whole optimiser step and all ranks; 0 for none.
        """


Scores = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class DetailedScores:
    """Scores with what is behind them."""

    scores: Scores
    """One number per sample, or one number per token of each sample."""
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Numbers behind the scores, one per sample, by name: logged beside the score, never trained on."""
    valid: Sequence[bool] | None = None
    """False for a sample that must carry no loss; None: all count."""


class RewardFn(ABC):
    """Scores answers: one number per sample, or one number per token of each sample."""

    name: str = ""
    """What the metrics call it; the class name if empty."""

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Scores | DetailedScores | Awaitable[Scores | DetailedScores]:
        """Scores in the order of `samples`; an `async def` is awaited."""

    def to(self, device: torch.device | str) -> None:
        """Move whatever the function computes with. Nothing, unless it holds a model."""
        return None


class RolloutEngine(ABC):
    """Samples answers to prompts from a policy; made from how to sample and a tokenizer.

    One that holds weights of its own is given the policy's. None is in any checkpoint.
    """

    says_kept: ClassVar[bool] = False
    """Whether a sampler that truncates by probability (top-p, top-k, min-p) comes with the sets it drew from."""
    says_entropy: ClassVar[bool] = False
    """Whether its own log-probabilities come with the entropy of what it drew from."""
    heeds_rows_at_once: ClassVar[bool] = False
    """Whether `rows_at_once` bounds how many answers it draws at a time."""

    @abstractmethod
    def with_spec(self, spec: Any) -> "RolloutEngine":
        """The same engine, asked to sample otherwise; weights and whatever else it holds are shared.

        Args:
            spec: a `rollout.spec.GenerationSpec`.
        """

    def take_weights(self, policy: Any) -> None:
        """Called before answers are asked for, whenever the policy may have moved since it was last called.

        Every rank calls it. Nothing, unless the engine samples from weights of its own.
        """
        return None

    def rest(self) -> None:
        """Called when a rollout is complete: the next answers are asked for after the policy was trained on it."""
        return None

    def ahead(self) -> "RolloutEngine":
        """An engine whose `generate` may run in a thread of its own while the policy is trained in another.

        It samples from the weights that it was given last and touches no generator that training draws from, so that
        its answers, and the training, do not depend on which of the two is faster. `take_weights` is called in the
        thread that trains, when nothing is being sampled.

        Raises:
            UserError: it cannot; what can.
        """
        raise UserError(
            f"updates.async_rollouts=true samples while the policy is trained, and {type(self).__name__} cannot: use "
            "VLLMServer, VLLMEngine or HFGenerate, or leave async_rollouts out"
        )

    def close(self) -> None:
        """Let go of everything that was started; `take_weights` starts it again."""
        return None

    @abstractmethod
    def generate(self, policy: Any, prompts: PromptBatch, *, seed: int) -> Generated:
        """Every prompt answered `num_samples` times, answers to one prompt side by side.

        Args:
            policy: what is sampled from, a `models.policy.Policy`.
            seed: names this draw; the same seed, prompts and weights give the same answers.
        """
