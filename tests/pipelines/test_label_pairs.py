import math
import random
from dataclasses import replace

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.pipelines.files import read_jsonl
from rlhf_lightning.pipelines.label_pairs import Annotator, LabelPairs
from rlhf_lightning.rollout.spec import GenerationSpec


class Words(RewardFn):
    def __call__(self, samples):
        return [float(len(sample.completion.split())) for sample in samples]


class Bored(RewardFn):
    def __call__(self, samples):
        return [0.0] * len(samples)


@pytest.mark.parametrize(
    ("annotator", "gap", "share"),
    [
        (Annotator(), 0.1, 1.0),
        (Annotator(), -0.1, 0.0),
        (Annotator(scale=2.0), 0.5, 1 / (1 + math.exp(-1.0))),
        (Annotator(flip_prob=0.2), 0.5, 0.8),
        (Annotator(scale=2.0, flip_prob=0.2), 0.5, 0.6 / (1 + math.exp(-1.0)) + 0.2),
    ],
)
def test_labels_follow_the_stated_probability(annotator, gap, share):
    rng = random.Random(0)
    labels = [annotator.prefers_first(gap, 0.0, rng) for _ in range(4000)]
    assert sum(labels) / 4000 == pytest.approx(share, abs=0.025)


def test_equal_scores_are_a_tie():
    assert Annotator(scale=1.0).prefers_first(0.5, 0.5, random.Random(0)) is None


@pytest.mark.parametrize("mistake", [{"scale": 0.0}, {"scale": -1.0}, {"flip_prob": 0.5}, {"flip_prob": -0.1}])
def test_an_impossible_annotator_is_refused(mistake):
    with pytest.raises(UserError, match=next(iter(mistake))):
        Annotator(**mistake)


@pytest.fixture
def job(tiny_model, write_jsonl, tmp_path):
    return LabelPairs(
        model=str(tiny_model),
        prompts=write_jsonl("p.jsonl", [{"prompt": "the film was"}, {"prompt": "a plot"}, {"prompt": "not"}]),
        reward=Words(),
        out=str(tmp_path / "pairs.jsonl"),
        num_pairs=20,
        out_val=str(tmp_path / "pairs_val.jsonl"),
        num_val=5,
        prompts_val=write_jsonl("v.jsonl", [{"prompt": "great"}]),
        generation=GenerationSpec(max_new_tokens=10, num_samples=4),
        prompts_at_once=2,
    )


def test_pairs_are_of_one_prompt_and_the_better_is_chosen(job):
    figures = job.run()
    pairs = read_jsonl(job.out)
    assert len(pairs) == 20 == figures["num_pairs"]
    assert figures["label_agreement"] == 1
    assert {pair["prompt"] for pair in pairs} == {"the film was", "a plot", "not"}
    for pair in pairs:
        assert pair["chosen_score"] == len(pair["chosen"].split()) > pair["rejected_score"]
        assert pair["rejected_score"] == len(pair["rejected"].split())
    val = read_jsonl(job.out_val)
    assert len(val) == 5 == figures["num_val"]
    assert {pair["prompt"] for pair in val} == {"great"}
    # 6 pairs a pass over the prompts, none twice: later passes draw anew
    assert len({(pair["chosen"], pair["rejected"]) for pair in pairs}) > 12


def test_noise_turns_labels_round_and_is_reported(job):
    figures = replace(job, num_pairs=60, annotator=Annotator(flip_prob=0.4), out_val=None, num_val=0).run()
    agreement = sum(pair["chosen_score"] > pair["rejected_score"] for pair in read_jsonl(job.out)) / 60
    assert figures["label_agreement"] == pytest.approx(agreement)
    assert 0.4 < agreement < 0.8


def test_the_seed_names_the_draws(job):
    job.run()
    first = read_jsonl(job.out)
    job.run()
    assert read_jsonl(job.out) == first
    replace(job, seed=1).run()
    assert read_jsonl(job.out) != first


def test_mistakes_are_explained(job):
    with pytest.raises(UserError, match="hardly tells its answers apart"):
        replace(job, num_pairs=2, reward=Bored()).run()
    with pytest.raises(UserError, match="pairs need an even number"):
        replace(job, generation=GenerationSpec(num_samples=3)).run()
    with pytest.raises(UserError, match="give both or neither"):
        replace(job, out_val=None).run()


def test_answers_to_different_prompts_are_never_compared(job):
    class PromptAndLength(RewardFn):
        def __call__(self, samples):
            return [1000 * len(sample.prompt) + len(sample.completion) for sample in samples]

    replace(job, reward=PromptAndLength(), out_val=None, num_val=0).run()
    for pair in read_jsonl(job.out):
        assert pair["chosen_score"] == 1000 * len(pair["prompt"]) + len(pair["chosen"])
        assert pair["rejected_score"] == 1000 * len(pair["prompt"]) + len(pair["rejected"])


def test_empty_and_equal_answers_make_no_pairs(job):
    class AnyDifference(RewardFn):
        def __call__(self, samples):
            return [float(i) for i in range(len(samples))]

    # answers of one token: often the end token, which says nothing, and often alike
    short = replace(job, reward=AnyDifference(), generation=GenerationSpec(max_new_tokens=1, num_samples=4))
    figures = replace(short, num_pairs=100, out_val=None, num_val=0).run()
    assert figures["dropped"] > 0
    for pair in read_jsonl(job.out):
        assert pair["chosen"].strip()
        assert pair["rejected"].strip()
        assert pair["chosen"] != pair["rejected"]
