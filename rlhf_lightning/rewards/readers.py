"""Which trained models some reward functions score with."""

from collections.abc import Iterable, Iterator

from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.scalar_reader import ScalarReader


def readers_of(rewards: Iterable[WeightedReward], *, timed: bool = False) -> Iterator[tuple[ScalarReader, bool]]:
    """The models behind reward functions, ensembles' members included, and whether each is asked under a time limit.

    Args:
        timed: whether all of these functions are.
    """
    for weighted in rewards:
        limited = timed or weighted.timeout_s is not None
        if isinstance(reader := getattr(weighted.reward, "reader", None), ScalarReader):
            yield reader, limited
        yield from readers_of(getattr(weighted.reward, "members", ()), timed=limited)
