"""The load-balancing loss of mixtures of experts, as every stage adds it: over an optimiser step, or per sequence."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.core.batches import (
    AnswerRollouts,
    Batch,
    PairBatch,
    PairRollouts,
    Rollouts,
    TokenBatch,
    concatenate_rows,
)
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.router import experts_chosen, load_balancing_loss
from rlhf_lightning.models.body import evaluating
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.routers import watch_routers
from rlhf_lightning.models.routing import Hearing, Routed, heard
from rlhf_lightning.models.scalar_head import ScalarModel

Over = Literal["step", "sequence"]
Rows = TokenBatch | Rollouts | AnswerRollouts
TOKENS, SEQUENCES, CHOSEN = "routed tokens", "routed sequences", "tokens of expert "
"""Names among the totals of a step."""


class RouterBalance:
    """The load-balancing loss of a stage's model, and what is logged of it.

        step        E sum_e f_e P_e,            over all tokens of the optimiser step and all layers
        sequence    mean of E sum_e f_e P_e     over the tokens of a sequence in a layer

    E experts, f_e the share of tokens that were sent to expert e (they sum to top_k), P_e its mean probability. Of a
    step that is cut into micro-batches or shared out over ranks, f is measured before the first of them, by a forward
    pass without gradient; as the loss is linear in P, the parts then add up to that of the whole.

    Tokens are those of prompts and answers: no padding, and no sequences in which nothing counts.

    Args:
        coef: weight of the loss; 0: there is none.
        over: what f and P are taken over.
    """

    def __init__(self, coef: float, over: Over) -> None:
        if not 0 <= coef < float("inf"):
            raise UserError(
                f"router_aux_loss_coef={coef} is no weight of a loss that evens experts out: give 0 (none) or more"
            )
        self.coef = coef
        self.over = over
        self._model: Policy | ScalarModel | None = None
        self._answers: Callable[[Rows], Tensor | None] = lambda rows: None
        self._step: Tensor | None = None
        """Of the present optimiser step so far: loss, tokens, and of each layer how many went to each expert."""

    @property
    def enabled(self) -> bool:
        """Whether there is such a loss."""
        return self.coef > 0

    def watch(self, model: Policy | ScalarModel, answers: Callable[[Rows], Tensor | None] = lambda rows: None) -> None:
        """Listen to the routers of the model that is trained, if there is a loss.

        Args:
            answers: which tokens are answers, where several share a prompt: see `Policy.hidden_states`.
        """
        if self.enabled:
            body = model.body if isinstance(model, Policy) else model.decoder
            watch_routers(body, f"router_aux_loss_coef={self.coef}")
            self._model, self._answers = model, answers

    def heard(self) -> AbstractContextManager[Hearing | None]:
        """The context in which the model runs whose routers are balanced, and nothing else with routers."""
        return heard(pool_layers=self.over == "step") if self.enabled else nullcontext()

    # ---- before a step ---------------------------------------------------------------------------------------------

    def measure(self, module: Any, batches: Sequence[Batch], *, cut: bool = False) -> dict[str, float]:
        """Sums over this rank's micro-batches of a step that each of them needs to know; of a step in one piece none.

        Args:
            module: the stage.
            cut: whether the batches will be taken in parts, even if there is only one.
        """
        if not self.enabled:
            return {}
        if self.over == "sequence":
            return {SEQUENCES: float(sum(_sequences(rows) for batch in batches for rows in _passes(batch)))}
        if len(batches) == 1 and module.data_ranks == 1 and not cut:
            return {}
        parts: list[Tensor] = []
        assert self._model is not None, "measured before there is a model"
        with torch.no_grad(), evaluating(self._model), module.trainer.precision_plugin.forward_context():
            for batch in batches:
                parts += module.splitter.results(batch.to(module.device), self._loads)
        tokens, *chosen = torch.stack(parts).sum(0).tolist()  # the step's one wait for the device
        return {TOKENS: float(tokens)} | {f"{CHOSEN}{expert}": float(times) for expert, times in enumerate(chosen)}

    def knows(self, batch: Batch) -> bool:
        """Whether the parts of a micro-batch can tell their share of the loss."""
        return not self.enabled or self.over == "sequence" or TOKENS in (batch.totals or {})

    def _loads(self, batch: Batch) -> Tensor:
        """Tokens, and how many went to each expert, over the layers of a batch [1 + experts]."""
        passes = _passes(batch)
        with self.heard() as hearing:
            assert hearing is not None
            for rows in passes:
                self._run(rows)
        loads = [_load(routed, rows) for routed, rows in zip(hearing.batches, passes, strict=True)]
        tokens = torch.stack([_counts(rows).sum() * load.shape[1] for rows, load in zip(passes, loads, strict=True)])
        # whole numbers, of which a float32 would lose count over many layers
        return torch.cat((tokens.sum()[None], torch.cat(loads).long().sum((0, 1))))

    def _run(self, rows: Rows) -> None:
        if isinstance(self._model, Policy):
            self._model.hidden_states(
                rows.tokens, rows.attention_mask, rows.positions, _segments(rows), answers=self._answers(rows)
            )
        else:
            assert isinstance(self._model, ScalarModel)
            self._model(rows)

    # ---- in a step -------------------------------------------------------------------------------------------------

    def share(self, hearing: Hearing | None, batch: Batch) -> Tensor | float:
        """This micro-batch's share of the step's loss, weighted; 0 without one.

        Args:
            hearing: what `heard` gave, after the model has run on the batch.
        """
        if hearing is None:
            return 0.0
        passes = list(zip(hearing.batches, _passes(batch), strict=True))
        loads = torch.cat([_load(routed, rows) for routed, rows in passes]).sum(0)  # [layers, experts]
        tokens = torch.stack([_counts(rows).sum() for _, rows in passes]).sum().float()
        of_step = self._of_step if self.over == "step" else self._of_sequences
        loss = of_step(passes, loads, tokens, batch)
        here = torch.cat((loss.detach()[None], tokens[None], loads.flatten()))
        self._step = here if self._step is None else self._step + here
        return self.coef * loss

    def _of_step(self, passes: list[tuple[Routed, Rows]], loads: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        probs = torch.stack([_masked(routed, rows).sum((0, 1, 2)) for routed, rows in passes]).sum(0)
        chosen, size = loads.sum(0), tokens * len(loads)
        if TOKENS in (batch.totals or {}):
            assert batch.totals is not None
            known = [batch.totals[f"{CHOSEN}{expert}"] for expert in range(len(probs))]
            chosen, size = torch.tensor(known, device=probs.device), torch.tensor(batch.totals[TOKENS]).to(probs.device)
        return load_balancing_loss(probs, chosen, size)

    def _of_sequences(self, passes: list[tuple[Routed, Rows]], loads: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        total = loads.new_zeros(())
        for routed, rows in passes:
            sequence, num = _sequence_of(rows)
            probs, counts = _masked(routed, rows), _counts(rows).float()
            chosen = _load(routed, rows, sequence, num)
            summed = probs.new_zeros(chosen.shape).index_add(0, sequence.flatten(), probs.flatten(0, 1))
            size = counts.new_zeros(num).index_add(0, sequence.flatten(), counts.flatten())
            total = total + load_balancing_loss(summed, chosen, size[:, None].expand(chosen.shape[:2])).sum()
        if batch.totals is None:
            sequences = float(sum(_sequences(rows) for _, rows in passes))
        else:
            sequences = batch.totals[SEQUENCES]
        return total / (max(sequences, 1.0) * len(loads))

    def take(self, add_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Metrics of the optimiser step that is over; starts over."""
        if self._step is None:
            return {}
        loss, tokens, *_ = summed = add_over_ranks(self._step)
        self._step = None
        return {"router/aux_loss": loss, "router/max_load": summed[2:].max() / tokens.clamp(min=1)}


def _passes(batch: Batch) -> list[Rows]:
    """The rows of a batch as a stage's model runs on them, one entry for each time that it runs."""
    if isinstance(batch, TokenBatch):
        return [batch]
    if isinstance(batch, Rollouts | AnswerRollouts):
        return [batch] if batch.extra is None else [batch, batch.extra]
    if isinstance(batch, PairRollouts):
        [rows] = _passes(batch.as_pairs())
        return [replace(rows, mask=rows.mask & batch.counts_in_loss.repeat(2)[:, None])]
    if isinstance(batch, PairBatch):
        # what stands at padding is masked, whatever it is
        rows = concatenate_rows((batch.chosen, batch.rejected), pad_id=0)
        return [rows] if batch.gold is None else [rows, batch.gold]
    return [batch.completions]  # type: ignore[attr-defined]


def _counts(rows: Rows) -> Tensor:
    """True on the tokens that are balanced [batch, time]."""
    return rows.attention_mask & rows.mask.any(-1, keepdim=True)


def _masked(routed: Routed, rows: Rows) -> Tensor:
    return torch.where(_counts(rows)[:, :, None, None], routed.probs, 0.0)


def _load(routed: Routed, rows: Rows, group: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """How many tokens went to each expert [groups, layers, experts]."""
    group = torch.zeros_like(rows.tokens) if group is None else group
    num_experts = routed.probs.shape[-1]
    return experts_chosen(routed.chosen, _counts(rows), group, num_groups=num_groups, num_experts=num_experts)


def _segments(rows: Rows) -> Tensor | None:
    return rows.segments if isinstance(rows, TokenBatch) else None


def _sequence_of(rows: Rows) -> tuple[Tensor, int]:
    """The number of the sequence that each token belongs to [batch, time], and how many there are."""
    segments = _segments(rows)
    if segments is None:
        return torch.arange(len(rows.tokens), device=rows.tokens.device)[:, None].expand_as(rows.tokens), len(
            rows.tokens
        )
    in_row = segments.amax(1)
    # padding points at some sequence, and adds nothing to it
    return (in_row.cumsum(0) - in_row)[:, None].add(segments - 1).clamp(min=0), int(in_row.sum())


def _sequences(rows: Rows) -> int:
    """How many sequences are balanced."""
    segments = _segments(rows)
    balanced = rows.mask.any(-1)
    return int((balanced if segments is None else segments.amax(1).where(balanced, 0)).sum())
