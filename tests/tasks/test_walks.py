import random
import re
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.pipelines.files import read_jsonl
from rlhf_lightning.tasks.walks import (
    GOAL,
    Graph,
    MakeWalks,
    Optimality,
    edges,
    optimality,
    shortest_ways,
)

GRAPH = Graph()


def test_the_graph_is_named_by_its_seed_and_has_a_way_on_from_everywhere():
    assert edges(Graph()) == edges(Graph(seed=1002)) != edges(Graph(seed=1))
    assert set(edges(GRAPH)) == set("abcdefghijklmnopqrstu")
    for node, after in edges(GRAPH).items():
        assert after
        assert node not in after


def test_shortest_ways_are_those_of_a_search_by_length():
    """Every walk of one step, of two steps, ...: the first length at which a start arrives is its fewest steps."""
    reached, ends = {}, {node: {node} for node in GRAPH.nodes}
    for steps in range(1, GRAPH.max_nodes):
        ends = {node: {b for a in found for b in edges(GRAPH)[a]} for node, found in ends.items()}
        for node, found in ends.items():
            if GOAL in found and node != GOAL:
                reached.setdefault(node, steps)
    assert shortest_ways(GRAPH) == reached


def way(start: str, graph: Graph) -> str:
    """A shortest way, by going to whatever is nearest to the goal."""
    nearness = {**shortest_ways(graph), GOAL: 0}
    walk = start
    while walk[-1] != GOAL:
        walk += min(edges(graph)[walk[-1]], key=lambda node: nearness.get(node, 99))
    return walk


def test_a_shortest_way_is_worth_one_and_each_detour_less():
    for start in shortest_ways(GRAPH):
        assert optimality(way(start, GRAPH), GRAPH) == 1
    # by hand on a triangle in which everything leads everywhere: b-a takes 1 step, b-c-a 2, b-c-b-a 3
    triangle = Graph(num_nodes=3, edge_frac=1.0, max_nodes=4)
    worth = [optimality(walk, triangle) for walk in ("ba", "bca", "bcba", "bcbca")]
    assert worth == pytest.approx([1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("walk", ["", "a", "bz", "the film", "b" * 3])
def test_what_is_no_walk_to_the_goal_is_worth_nothing(walk):
    assert optimality(walk, GRAPH) == 0


def test_no_jump_and_no_stop_before_the_goal_counts():
    start = next(node for node, steps in shortest_ways(GRAPH).items() if steps == 3)
    walk = way(start, GRAPH)
    assert optimality(walk[:-1], GRAPH) == 0
    assert GOAL not in edges(GRAPH)[start]
    assert optimality(start + GOAL, GRAPH) == 0


def test_the_reward_reads_prompt_and_answer_as_one_walk():
    walk = way("b", GRAPH)
    samples = [Sample(prompt=walk[0], completion=text, record={}, tokens=(), finished=True) for text in (walk[1:], "z")]
    assert Optimality()(samples) == [1.0, 0.0]


def test_the_material_is_walks_along_edges_that_stop_at_the_goal(tmp_path):
    figures = MakeWalks(str(tmp_path), num_walks=200, num_prompts=50, seed=3).run()
    walks = [record["prompt"] + record["completion"] for record in read_jsonl(tmp_path / "sft.jsonl")]
    assert len(walks) == 200
    for walk in walks:
        assert all(b in edges(GRAPH)[a] for a, b in pairwise(walk))
        assert GOAL not in walk[:-1]
        assert walk[-1] == GOAL or len(walk) == GRAPH.max_nodes
    assert figures["optimality"] == pytest.approx(sum(optimality(walk, GRAPH) for walk in walks) / 200)
    starts = [record["prompt"] for record in read_jsonl(tmp_path / "prompts.jsonl")]
    assert {starts.count(start) for start in shortest_ways(GRAPH)} == {2, 3}
    assert {record["prompt"] for record in read_jsonl(tmp_path / "starts.jsonl")} == set(shortest_ways(GRAPH))


def test_the_tokenizer_gives_letters_back(tmp_path):
    MakeWalks(str(tmp_path), num_walks=1, num_prompts=1).run()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = "".join(random.Random(0).choices(GRAPH.nodes, k=9))
    ids = tokenizer(text).input_ids
    assert len(ids) == 9
    assert tokenizer.decode(ids) == text
    assert tokenizer("z").input_ids == [tokenizer.unk_token_id]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_nodes": 27}, "graph.num_nodes=27: a node is a letter; use 2 to 26"),
        ({"edge_frac": 0.0}, "graph.edge_frac=0.0: use a probability above 0"),
        ({"max_nodes": 2}, "graph.max_nodes=2: a walk with a choice has at least 3 nodes"),
    ],
)
def test_a_graph_that_cannot_be_is_an_error(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        Graph(**options)


def test_a_graph_without_a_way_to_the_goal_is_an_error():
    said = "graph.edge_frac=0.01, seed=1: from no node does a way lead to 'a'; use more edges or another seed"
    with pytest.raises(UserError, match=re.escape(said)):
        Graph(num_nodes=4, edge_frac=0.01, seed=1)
