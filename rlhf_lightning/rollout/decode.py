"""Our own decoding: a prompt is read once for all of its answers, and a finished answer leaves the batch.

transformers' `generate` reads every prompt as often as it has answers, and runs every row until the last one is done.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.kept import pack_kept
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.shared_prompts import why_no_cache
from rlhf_lightning.rollout.growing_cache import growing_cache
from rlhf_lightning.rollout.mixture import MixtureSpec, mixed_logits
from rlhf_lightning.rollout.penalty import penalise_repetition

LEAVE_AT = 0.875
"""The batch is cut down to its unfinished rows once they are no more than this share of it."""
_ONE = 1 << 40
"""What a probability of 1 counts as, where probabilities are added up."""


@dataclass(frozen=True)
class Rule:
    """How a token is picked from logits."""

    forbid: LogitsProcessorList
    """What forbids tokens, in front of everything else: a minimum length."""
    repetition_penalty: float
    """What repeating costs, behind a mixture of models and in front of the temperature; 1: nothing."""
    warp: LogitsProcessorList | None
    """Temperature and truncation; None: the most probable token is taken."""
    keep_sets: bool
    """Note which tokens could be drawn."""
    keep_logprobs: bool
    """Note the log-probability of what was drawn, and the entropy of what it was drawn from."""
    ends: Tensor
    """Ids that end an answer."""
    stops: Callable[[Tensor], Tensor] | None
    """Whether rows [rows, time] end with a stop string [rows]; None: there is none."""


@dataclass(frozen=True)
class Drawn:
    """Answers as they were drawn."""

    tokens: Tensor
    """Prompt and answer ids [rows, time]; padding behind the end of an answer."""
    lengths: Tensor
    """The width at which each row finished, -1 where it was cut off [rows]."""
    noted: dict[str, Tensor]
    """Sets [rows, time, bytes], log-probabilities and entropies [rows, time] of the drawn tokens; 0 elsewhere."""

    def behind(self, columns: int, *, pad_id: int) -> "Drawn":
        """The same behind so many more columns of padding."""
        return Drawn(
            _pad_columns(self.tokens, columns, 0, pad_id),
            torch.where(self.lengths < 0, -1, self.lengths + columns),
            {name: _pad_columns(x, columns, 0, 0) for name, x in self.noted.items()},
        )

    def select(self, rows: Tensor) -> "Drawn":
        """The answers at `rows`."""
        return Drawn(self.tokens[rows], self.lengths[rows], {name: x[rows] for name, x in self.noted.items()})


def concatenate(parts: Sequence[Drawn], *, pad_id: int) -> Drawn:
    """The answers of all parts, padded on the right to the widest."""
    end = max(part.tokens.shape[1] for part in parts)

    def column(name: str) -> Tensor:
        return torch.cat([_pad_columns(x, 0, end - x.shape[1], 0) for x in (part.noted[name] for part in parts)])

    tokens = [_pad_columns(part.tokens, 0, end - part.tokens.shape[1], pad_id) for part in parts]
    lengths = torch.cat([part.lengths for part in parts])
    return Drawn(torch.cat(tokens), lengths, {name: column(name) for name in parts[0].noted})


def _pad_columns(x: Tensor, before: int, behind: int, value: int) -> Tensor:
    """[rows, time, ...] with more columns on both sides."""
    return torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 2), before, behind), value=value)


def why_not(policy: Policy) -> str | None:
    """What keeps a model from being decoded here; None: nothing does."""
    model = policy.causal_lm
    for name in ("prepare_inputs_for_generation", "_prepare_cache_for_generation", "_sample", "generate"):
        if getattr(type(model), name, None) is not getattr(GenerationMixin, name):
            return f"it has a {name} of its own"
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        return "its forward pass takes no logits_to_keep"
    return why_no_cache(model)


def look_every(device: torch.device) -> int:
    """Steps between two looks for who is done: each waits for an accelerator, and costs nothing on the CPU."""
    return 1 if device.type == "cpu" else 8


def decode(
    policy: Policy,
    tokens: Tensor,
    attention_mask: Tensor,
    prompt_of_row: Tensor,
    uniforms: Tensor,
    rule: Rule,
    *,
    pad_id: int,
    mixture: MixtureSpec | None = None,
) -> Drawn:
    """Answers to left-padded prompts.

    Every row draws with numbers of its own: which rows share a batch, or leave it, decides nothing.

    Args:
        policy: in evaluation mode; `why_not` has nothing against it.
        tokens, attention_mask: the prompts [prompts, prompt time].
        prompt_of_row: which of them each row answers [rows].
        uniforms: of [0, 1), one per row and step; as many steps as an answer may have tokens [rows, steps].
        rule: how tokens are picked.
        pad_id: stands behind the end of an answer.
        mixture: another model that has a say in every token.
    Raises:
        UserError: the logits are not finite.
    """
    width, steps, device = tokens.shape[1], uniforms.shape[1], tokens.device
    num_rows = len(prompt_of_row)
    readers = [_Reader(policy, tokens, attention_mask, prompt_of_row, steps)]
    if mixture is not None:
        readers.append(_Reader(mixture.reference, tokens, attention_mask, prompt_of_row, steps))
    batch = _Rows(
        number=torch.arange(num_rows, device=device),
        ids=torch.nn.functional.pad(tokens[prompt_of_row], (0, steps), value=pad_id),
        uniforms=uniforms,
        lengths=torch.full((num_rows,), -1, device=device),
        broken=torch.zeros(num_rows, dtype=torch.bool, device=device),
    )
    whole, notes = batch.copy(), _Notes(num_rows)
    interval = look_every(device)
    optimised = getattr(policy.causal_lm, "_optimize_model_for_decode", nullcontext)  # of experts, off the CPU
    with optimised():
        for step in range(steps):
            here = width + step
            scores = readers[0].logits.float()
            scores = rule.forbid(batch.ids[:, :here], scores)
            if mixture is not None:
                scores = mixed_logits(scores, readers[1].logits, mixture.share)
            if rule.repetition_penalty != 1:
                scores = penalise_repetition(scores, batch.ids[:, :here], readers[0].mask, rule.repetition_penalty)
            drawn, broken = _pick(rule, batch, scores, here, step, notes)
            done = batch.lengths >= 0
            drawn = torch.where(done, pad_id, drawn)
            batch.ids[:, here] = drawn
            ends = torch.isin(drawn, rule.ends)
            if rule.stops is not None:
                ends |= rule.stops(batch.ids[:, : here + 1])
            batch.lengths = torch.where(ends & ~done, here + 1, batch.lengths)
            batch.broken |= broken & ~done
            if step + 1 == steps:
                break
            if (step + 1) % interval == 0:
                _check(batch)
                unfinished = (batch.lengths < 0).nonzero()[:, 0]
                if not len(unfinished):
                    break
                if len(unfinished) <= LEAVE_AT * len(batch.number):
                    batch.put_into(whole)
                    batch = batch.select(unfinished)
                    drawn = drawn[unfinished]
                    for reader in readers:
                        reader.select(unfinished)
            for reader in readers:
                reader.read(drawn)
    _check(batch)
    batch.put_into(whole)
    end = here + 1 if bool((whole.lengths < 0).any()) else int(whole.lengths.max())
    return Drawn(whole.ids[:, :end], whole.lengths, notes.about(width, end))


def _pick(rule: Rule, batch: "_Rows", scores: Tensor, here: int, step: int, notes: "_Notes") -> tuple[Tensor, Tensor]:
    """The next token of each row, and whether its distribution was none."""
    if rule.warp is None:
        return scores.argmax(-1), scores.isnan().any(-1)
    warped = rule.warp(batch.ids[:, :here], scores)
    logprobs = warped.log_softmax(-1)
    probs = logprobs.exp()
    drawn, broken = draw(probs, batch.uniforms[:, step])
    if rule.keep_sets:
        notes.add("kept", batch.number, pack_kept(warped > -torch.inf))
    if rule.keep_logprobs:
        notes.add("sampler_logprobs", batch.number, logprobs.gather(-1, drawn[:, None])[:, 0])
        # 0 log 0 is 0, not NaN, for what was cut off
        finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
        notes.add("sampler_entropy", batch.number, -torch.linalg.vecdot(probs, finite))
    return drawn, broken


def draw(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One outcome per row by inverting the distribution function, and whether the row was no distribution.

    Probabilities are added up as whole numbers: sums do not depend on their order then, on any device. What has a
    probability below 2^-40 is not drawn.

    Args:
        probs: [rows, outcomes], each row sums to 1.
        uniforms: of [0, 1) [rows].
    """
    below = (probs * _ONE).long().cumsum(-1)
    total = below[:, -1]
    # rounded down, and the sum is never reached, whatever the precision of the product
    threshold = torch.minimum((uniforms * total).long(), total - 1)
    drawn = torch.searchsorted(below, threshold[:, None], right=True)[:, 0]
    broken = (total - _ONE).abs() > _ONE // 256
    return torch.where(broken, 0, drawn), broken


def _check(batch: "_Rows") -> None:
    if bool(batch.broken.any()):
        raise UserError(
            "the policy's logits are not finite, so there is nothing to sample from: its weights broke in an earlier "
            "step. Lower the learning rate, or clip gradients, and go on from a checkpoint before that"
        )


@dataclass
class _Rows:
    """The rows of a batch."""

    number: Tensor
    """Which of all rows each is."""
    ids: Tensor
    uniforms: Tensor
    lengths: Tensor
    broken: Tensor

    def copy(self) -> "_Rows":
        return _Rows(**{name: value.clone() for name, value in vars(self).items()})

    def select(self, rows: Tensor) -> "_Rows":
        return _Rows(**{name: value[rows] for name, value in vars(self).items()})

    def put_into(self, whole: "_Rows") -> None:
        """Ids and lengths to where they belong among all rows."""
        whole.ids[self.number], whole.lengths[self.number] = self.ids, self.lengths


class _Reader:
    """A model that reads along: the prompts once each, then one token a step of every row.

    Args:
        model: the policy, or a reference as it was.
        tokens, attention_mask, prompt_of_row: as for `decode`.
        steps: how many tokens will be read at most behind the prompts.
    """

    def __init__(
        self, model: Policy | Reference, tokens: Tensor, attention_mask: Tensor, prompt_of_row: Tensor, steps: int
    ) -> None:
        self.policy = model.policy if isinstance(model, Reference) else model
        self.speaking = model.as_it_was if isinstance(model, Reference) else nullcontext
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        self.cache: Any = growing_cache(self.policy.config, tokens.shape[1] + steps)
        logits = self._run(tokens, attention_mask, positions)
        self.logits = logits[prompt_of_row]
        """Of the next token [rows, vocab]."""
        self.mask = attention_mask[prompt_of_row]
        self.position = positions[:, -1][prompt_of_row]
        self.cache.batch_select_indices(prompt_of_row)

    def _run(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        with self.speaking():
            logits, self.cache = self.policy.next_logits(
                input_ids=tokens, attention_mask=mask.long(), position_ids=positions, past_key_values=self.cache
            )
        return logits

    def read(self, drawn: Tensor) -> None:
        """One more token of each row."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        self.position = self.position + 1
        self.logits = self._run(drawn[:, None], self.mask, self.position[:, None])

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows; the logits are those of the token before."""
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.cache.batch_select_indices(rows)


class _Notes:
    """What was said of each drawn token, of rows that have left the batch too."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._noted: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, rows: Tensor, values: Tensor) -> None:
        self._noted.setdefault(name, []).append((rows, values))

    def about(self, width: int, end: int) -> dict[str, Tensor]:
        """[rows, end, ...] by name, 0 over the prompt and where a row was not there any more."""
        whole: dict[str, Tensor] = {}
        for name, steps in self._noted.items():
            first = steps[0][1]
            out = first.new_zeros((self.num_rows, end, *first.shape[1:]))
            for column, (rows, values) in enumerate(steps[: end - width], start=width):
                out[rows, column] = values
            whole[name] = out
        return whole
