"""Shortest paths on a random graph, learnt from random walks: the task of trlX's `randomwalks` example.

The walks know nothing of short ways, so imitation stays with the walks' own average, and only the reward tells more.
"""

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.pipelines.files import write_folder, write_jsonl
from rlhf_lightning.tasks.characters import character_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GOAL = LETTERS[0]


@dataclass(frozen=True)
class Graph:
    """A directed random graph whose nodes are letters; the goal is "a"."""

    num_nodes: int = 21
    edge_frac: float = 0.1
    """Probability of each edge."""
    max_nodes: int = 10
    """Nodes of the longest walk that counts, start and goal included."""
    seed: int = 1002
    """Names the edges."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_nodes <= len(LETTERS):
            raise UserError(f"graph.num_nodes={self.num_nodes}: a node is a letter; use 2 to {len(LETTERS)}")
        if not 0 < self.edge_frac <= 1:
            raise UserError(f"graph.edge_frac={self.edge_frac}: use a probability above 0")
        if self.max_nodes < 3:
            raise UserError(f"graph.max_nodes={self.max_nodes}: a walk with a choice has at least 3 nodes")
        if not shortest_ways(self):
            raise UserError(
                f"graph.edge_frac={self.edge_frac}, seed={self.seed}: from no node does a way lead to {GOAL!r}; use "
                "more edges or another seed"
            )

    @property
    def nodes(self) -> str:
        return LETTERS[: self.num_nodes]


@lru_cache
def edges(graph: Graph) -> Mapping[str, str]:
    """Where one can go from each node; from every node somewhere."""
    rng = random.Random(counter_seed(graph.seed, "walks", "graph"))
    found = {}
    for node in graph.nodes:
        others = [other for other in graph.nodes if other != node]
        drawn = [other for other in others if rng.random() < graph.edge_frac]
        found[node] = "".join(drawn or [rng.choice(others)])
    return found


@lru_cache
def shortest_ways(graph: Graph) -> Mapping[str, int]:
    """Fewest steps to the goal from each node that a walk of `max_nodes` leads from; the goal itself is left out."""
    to_goal = {GOAL: 0}
    queue = deque([GOAL])
    while queue:
        node = queue.popleft()
        for before, after in edges(graph).items():
            if node in after and before not in to_goal:
                to_goal[before] = to_goal[node] + 1
                queue.append(before)
    return {node: to_goal[node] for node in graph.nodes if 0 < to_goal.get(node, 0) < graph.max_nodes}


def optimality(walk: str, graph: Graph) -> float:
    """How short a walk is among those that arrive.

        optimality = (max_nodes - steps) / (max_nodes - fewest steps)

    1 for a shortest way; 0 for what leaves the edges, does not end at the goal, is too long, or is no walk at all.
    """
    fewest = shortest_ways(graph).get(walk[:1])
    along_edges = all(after in edges(graph).get(before, "") for before, after in pairwise(walk))
    if fewest is None or not along_edges or walk[-1] != GOAL:
        return 0.0
    return max(graph.max_nodes - (len(walk) - 1), 0) / (graph.max_nodes - fewest)


@dataclass(frozen=True)
class Optimality(RewardFn):
    """How short the walk is that prompt and answer make: from 0 (never arrives) to 1 (a shortest way).

    Args:
        graph: the graph that is walked on.
    References:
        Havrilla et al., trlX, 2023, its example `randomwalks`. https://github.com/CarperAI/trlx
    """

    graph: Graph = Graph()

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [optimality(sample.prompt + sample.completion, self.graph) for sample in samples]


@dataclass(frozen=True)
class MakeWalks:
    """Writes random walks, starts and a tokenizer of letters into one folder.

    sft.jsonl holds walks that stop at the goal, or where `max_nodes` cuts them off, as `prompt` (the start) and
    `completion`; prompts.jsonl holds starts, each about as often; starts.jsonl each once.
    """

    out_dir: str
    """Folder to write."""
    num_walks: int = 1000
    """Walks of sft.jsonl."""
    num_prompts: int = 640
    """Starts of prompts.jsonl."""
    graph: Graph = Graph()
    """The graph that is walked on."""
    seed: int = 0
    """Names all draws but the graph's."""

    def run(self) -> dict[str, float]:
        starts = list(shortest_ways(self.graph))
        rng = random.Random(counter_seed(self.seed, "walks", "walks"))
        walks = [self._walk(rng.choice(starts), rng) for _ in range(self.num_walks)]
        folder = Path(self.out_dir)
        write_jsonl(folder / "sft.jsonl", ({"prompt": walk[0], "completion": walk[1:]} for walk in walks))
        write_jsonl(folder / "prompts.jsonl", ({"prompt": start} for start in self._spread(starts)))
        write_jsonl(folder / "starts.jsonl", ({"prompt": start} for start in starts))
        write_folder(folder / "tokenizer", character_tokenizer(self.graph.nodes).save_pretrained)
        optimal = sum(optimality(walk, self.graph) for walk in walks) / len(walks)
        return {"num_starts": float(len(starts)), "optimality": optimal}

    def _walk(self, start: str, rng: random.Random) -> str:
        walk = start
        while walk[-1] != GOAL and len(walk) < self.graph.max_nodes:
            walk += rng.choice(edges(self.graph)[walk[-1]])
        return walk

    def _spread(self, starts: Sequence[str]) -> Iterator[str]:
        """All starts, in an order of its own each time round."""
        rng = random.Random(counter_seed(self.seed, "walks", "prompts"))
        left: list[str] = []
        for _ in range(self.num_prompts):
            left = left or rng.sample(starts, len(starts))
            yield left.pop()
