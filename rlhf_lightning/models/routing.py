"""What the routers of a mixture of experts say while its decoder runs, told apart by token.

Routers speak by forward hooks (`models.routers`), into whatever `heard` is open. A decoder that runs on other rows than
a batch has (without padding; a prompt once for several answers) is followed by `lay_out`: what was said then goes where
the hidden states go.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """What the routers said of the tokens of a batch."""

    probs: Tensor
    """Probability of each expert [batch, time, layers, experts]; of layers that are pooled one entry, their sum."""
    chosen: Tensor
    """The experts that each token was sent to [batch, time, layers, top_k]."""


class Hearing:
    """Collects what routers say.

    Args:
        pool_layers: keep the sum of the layers' probabilities in their place.
    """

    def __init__(self, *, pool_layers: bool) -> None:
        self.pool_layers = pool_layers
        self.batches: list[Routed] = []
        """One for each batch that the decoder ran on."""
        self._layers: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = []

    def say(self, logits: Tensor, chosen: Tensor, probabilities: Callable[[Tensor], Tensor]) -> None:
        """One layer's router, of all tokens [tokens, ...]."""
        self._layers.append((logits, chosen, probabilities))

    def end_pass(self, rows: int, time: int) -> None:
        """The decoder has run on so many tokens."""
        layers, self._layers = self._layers, []
        # here and not in the layers, which may be checkpointed: they are run again when nobody listens any more
        probs = [probabilities(logits.float()) for logits, _, probabilities in layers]
        together = sum(probs[1:], probs[0])[:, None] if self.pool_layers else torch.stack(probs, dim=1)
        chosen = torch.stack([chosen for _, chosen, _ in layers], dim=1)
        self.batches.append(Routed(together.unflatten(0, (rows, time)), chosen.unflatten(0, (rows, time))))


_hearing: ContextVar[Hearing | None] = ContextVar("hearing", default=None)


def hearing() -> Hearing | None:
    """Who listens; None: nobody does."""
    return _hearing.get()


@contextmanager
def heard(*, pool_layers: bool) -> Iterator[Hearing]:
    """Inside, routers are listened to."""
    listener = Hearing(pool_layers=pool_layers)
    token = _hearing.set(listener)
    try:
        yield listener
    finally:
        _hearing.reset(token)


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, nobody listens: what is computed there is not trained on."""
    token = _hearing.set(None)
    try:
        yield
    finally:
        _hearing.reset(token)


def end_pass(tokens: Tensor) -> None:
    """A decoder has run on `tokens` [rows, time]."""
    listener = _hearing.get()
    if listener is not None:
        listener.end_pass(*tokens.shape)


def lay_out(place: Callable[..., Tensor], *states: Tensor) -> Tensor:
    """Hidden states of the last passes put where they belong, and what the routers said of them likewise.

    Args:
        place: takes as many tensors [rows, time, channels] as there are passes, and copies whole tokens.
    """
    listener = _hearing.get()
    if listener is not None:
        last = listener.batches[-len(states) :]
        del listener.batches[-len(states) :]

        def placed(parts: list[Tensor]) -> Tensor:
            return place(*(x.flatten(2) for x in parts)).unflatten(2, parts[0].shape[2:])

        listener.batches.append(Routed(placed([x.probs for x in last]), placed([x.chosen for x in last])))
    return place(*states)
