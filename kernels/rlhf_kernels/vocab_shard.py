"""A head whose vocabulary is cut over processes: each has the logits of its own tokens, and all the sums of a row.

With m, s and x_y of `rows` as parts of every process,

    m = max of m_k        s = sum of exp(m_k - m) s_k        x_y from the process that has token y

so what travels is a handful of numbers per row: forward one all-gather of them, backward one all-reduce of the gradient
in the hidden states. Logits, weight and its gradient stay where they are. The formula: Shoeybi et al., Megatron-LM,
2019, sec. 3. arXiv:1909.08053
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.rows import RowStats, RowSums, Transform, finished, known, merged, row_stats


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the head's weight this process holds. All processes of the group are given the same hidden states.

    Made by `of`; the parts are those of `torch.chunk`, and of a DTensor with Shard(0).
    """

    first: int
    """Token id of the first row."""
    vocab: int
    """Rows of all processes together."""
    widest: int
    """Rows of the process that has most."""
    group: str
    """Name of the process group."""

    @staticmethod
    def of(vocab: int, group: Any) -> "VocabShard":
        """The part of this process.

        Args:
            vocab: size of the whole vocabulary.
            group: a `torch.distributed.ProcessGroup`.
        """
        size, rank = group.size(), group.rank()
        widest = -(-vocab // size)
        if widest * (size - 1) >= vocab:
            raise ValueError(
                f"a vocabulary of {vocab} tokens cut over {size} processes, {widest} to each, leaves nothing for the "
                "last one: use fewer"
            )
        return VocabShard(rank * widest, vocab, widest, group.group_name)

    @property
    def width(self) -> int:
        """Rows of this process."""
        return min(self.widest, self.vocab - self.first)


def check_shard(shard: VocabShard | None, weight: Tensor) -> tuple[int, int, str]:
    """Size of the vocabulary, id of the first row of `weight`, and name of the group that has the others ("": none)."""
    if shard is None:
        return weight.shape[0], 0, ""
    if weight.shape[0] != shard.width:
        raise ValueError(
            f"weight has {weight.shape[0]} rows but the shard that begins at token {shard.first} of {shard.vocab} has "
            f"{shard.width}: give this process's rows alone"
        )
    return shard.vocab, shard.first, shard.group


def sums_of_part(op: str, logits: Tensor, ids: Tensor, transform: Transform, *, with_entropy: bool) -> RowSums:
    """Sums of this process's columns [N, width]; ids [N] count from its first one and may be outside.

    Runs the kernel where there is one, with any token in place of those that others have.
    """
    inside = known(ids, logits.shape[-1])
    stats = row_stats(op, logits, torch.where(inside, ids, 0), transform, with_entropy=with_entropy)
    gone = stats.maximum == -torch.inf  # none of these tokens can be said: nothing to add
    total = stats.log_sum.exp().masked_fill(gone, 0.0)
    others = torch.where(inside, stats.miss * total, total).masked_fill(gone, 0.0)
    chosen = torch.where(inside & ~gone, stats.logprobs + stats.log_sum + stats.maximum, -torch.inf)
    weighted = stats.entropy
    if with_entropy:
        weighted = ((stats.log_sum - stats.entropy) * total).masked_fill(gone, 0.0)
    return RowSums(stats.maximum, others, chosen, weighted)


def stats_of_all(sums: RowSums, is_known: Tensor, group: str) -> RowStats:
    """Statistics of whole rows from each process's sums; the same bits on all of them."""
    import torch.distributed as distributed

    if not sums.maximum.numel():  # no row, on no process
        return finished(sums, is_known)
    here = torch.stack([field for field in sums if field.numel()])
    processes = _process_group(group)
    everywhere = [torch.empty_like(here) for _ in range(processes.size())]
    distributed.all_gather(everywhere, here, group=processes)
    total: RowSums | None = None
    for maximum, others, chosen, *weighted in everywhere:
        part = RowSums(maximum, others, chosen, weighted[0] if weighted else maximum.new_empty(0))
        total = part if total is None else merged(total, part)
    assert total is not None
    return finished(total, is_known)


def add_over_group(x: Tensor, group: str) -> Tensor:
    """The sum over the group's processes, on each of them; written over `x`."""
    import torch.distributed as distributed

    distributed.all_reduce(x, group=_process_group(group))
    return x


def _process_group(name: str) -> Any:
    """An op's schema takes no groups: theirs are names."""
    import torch.distributed.distributed_c10d as named

    resolve: Any = named._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)
