"""Answers worth a second look: groups kept from earlier rollouts, to stand in for those that teach nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.core.batches import Rollouts, concatenate_rows
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.seeding import counter_seed


@dataclass(frozen=True)
class ReplaySpec:
    """Keeps groups whose answers differ in score, and replays them in the place of groups whose answers do not.

    Replayed answers come with the log-probabilities of the policy that sampled them, so their ratios are right and the
    loss's clipping holds for them as for any stale answer.

    Args:
        capacity: groups kept per process; beyond it the one of least spread goes.
        max_age: rollouts after which a group is forgotten; null: never.
    References:
        Schaul et al., Prioritized Experience Replay, 2015. arXiv:1511.05952
    """

    capacity: int = 64
    max_age: int | None = 8

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UserError(f"replay.capacity={self.capacity} keeps nothing: give at least 1, or leave replay out")
        if self.max_age is not None and self.max_age < 1:
            raise UserError(f"replay.max_age={self.max_age} forgets at once: give at least 1, or null")


class ReplayBuffer:
    """Groups of answers on the CPU, drawn in proportion to the spread of their scores.

    Args:
        spec: how many, and for how long.
        pad_id: what shorter answers are padded with.
        seed: names the draws, with the number of the rollout.
    """

    def __init__(self, spec: ReplaySpec, *, pad_id: int, seed: int) -> None:
        self.spec = spec
        self.pad_id = pad_id
        self.seed = seed
        self._groups: list[Rollouts] = []
        self._born: list[int] = []
        """The rollout each group comes from."""

    def __len__(self) -> int:
        return len(self._groups)

    def exchange(self, rollouts: Rollouts, informative: Tensor, *, rollout: int) -> tuple[Rollouts, int]:
        """Rollouts with uninformative groups replaced as far as the buffer reaches; the informative ones are kept.

        A group is replaced if none of its answers is informative. Answers that carry no loss (dropped, or cut off and
        masked) leave a group smaller than it was sampled: a replayed group takes the places of as many groups as it has
        answers, and only the answers of a group that differ in score are kept.

        Args:
            rollouts: with their credit.
            informative: True for answers that teach something [batch].
            rollout: number of the rollout: names the draw, and tells how old a group is.
        Returns:
            At most as many answers as before, and how many groups are replayed.
        """
        self._forget(rollout)
        taught = torch.isin(rollouts.groups, rollouts.groups[informative])
        dull = list(_groups_of(rollouts, ~taught))
        drawn = self._draw(len(dull), rollout)
        for rows in _groups_of(rollouts, informative):
            if len(rollouts.scores[rows].unique()) > 1:
                self._add(rollouts.select(rows).to("cpu"), rollout)
        leaving, entering = _fitting(dull, drawn)
        if not entering:
            return rollouts, 0
        staying = torch.ones_like(informative)
        staying[torch.cat(leaving)] = False
        first_free = int(rollouts.groups.max()) + 1
        replayed = [
            replace(
                group.to(rollouts.tokens.device),
                groups=torch.full_like(group.groups, first_free + i).to(staying.device),
            )
            for i, group in enumerate(entering)
        ]
        kept = [rollouts.select(staying.nonzero()[:, 0])] if staying.any() else []
        return concatenate_rows([*kept, *replayed], pad_id=self.pad_id), len(entering)

    def _draw(self, wanted: int, rollout: int) -> list[Rollouts]:
        number = min(wanted, len(self._groups))
        if number == 0:
            return []
        spread = torch.tensor([float(group.scores.std(correction=0)) for group in self._groups])
        generator = torch.Generator().manual_seed(counter_seed(self.seed, "replay", rollout))
        return [self._groups[i] for i in torch.multinomial(spread, number, generator=generator).tolist()]

    def _add(self, group: Rollouts, rollout: int) -> None:
        self._groups.append(group)
        self._born.append(rollout)
        if len(self._groups) > self.spec.capacity:
            spread = [float(kept.scores.std(correction=0)) for kept in self._groups]
            self._remove(spread.index(min(spread)))

    def _forget(self, rollout: int) -> None:
        if self.spec.max_age is not None:
            for index in reversed(range(len(self._groups))):
                if rollout - self._born[index] > self.spec.max_age:
                    self._remove(index)

    def _remove(self, index: int) -> None:
        del self._groups[index], self._born[index]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        groups = [
            {f.name: value for f in fields(group) if isinstance(value := getattr(group, f.name), Tensor)}
            for group in self._groups
        ]
        return {"groups": groups, "born": list(self._born)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._groups = [Rollouts(**group) for group in state["groups"]]
        self._born = list(state["born"])


def _fitting(dull: Sequence[Tensor], drawn: Sequence[Rollouts]) -> tuple[list[Tensor], list[Rollouts]]:
    """Which groups leave, by their rows, and which of those drawn take their places; no more answers than leave."""
    left, leaving, entering = list(dull), [], []
    for group in drawn:
        freed: list[Tensor] = []
        while left and sum(map(len, freed)) < len(group.scores):
            freed.append(left.pop(0))
        if sum(map(len, freed)) < len(group.scores):
            break
        leaving += freed
        entering.append(group)
    return leaving, entering


def _groups_of(rollouts: Rollouts, chosen: Tensor) -> Sequence[Tensor]:
    """Row numbers of every group that `chosen` holds, group by group."""
    rows = chosen.nonzero()[:, 0]
    order = rows[rollouts.groups[rows].argsort(stable=True)]
    _, sizes = rollouts.groups[order].unique_consecutive(return_counts=True)
    return order.split(sizes.tolist()) if len(order) else []
