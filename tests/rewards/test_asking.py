"""What a reward function does wrong: named, and kept from the weights as the config says."""

import asyncio
import logging
import math
import sys
import time

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import DetailedScores, RewardFn, Sample
from rlhf_lightning.rewards.combine import WeightedReward, score_samples

SAMPLES = [Sample(f"Q{i}?", text, tokens=tuple(range(i + 1))) for i, text in enumerate(("good", "bad", "fine"))]


class By(RewardFn):
    """Scores each sample by a function of it."""

    def __init__(self, function):
        self.function = function

    def __call__(self, samples):
        return [self.function(sample) for sample in samples]


class Whole(By):
    """Scores a batch by a function of it."""

    def __call__(self, samples):
        return self.function(samples)


def unless_bad(value):
    """1 for every sample, and `value`, or what it does, for the bad one."""

    def score(sample):
        if sample.completion != "bad":
            return 1.0
        return value() if callable(value) else value

    return score


def raising():
    raise RuntimeError("cannot read it")


def hanging():
    time.sleep(3.0)
    return 5.0


FAULTS = {
    "raises": (By(unless_bad(raising)), "raised RuntimeError: cannot read it"),
    "exits": (By(unless_bad(sys.exit)), "raised SystemExit"),
    "hangs": (By(unless_bad(hanging)), r"did not answer within timeout_s=0\.2 seconds"),
    "none": (By(unless_bad(None)), "returned None"),
    "nan": (By(unless_bad(math.nan)), "returned nan"),
    "inf": (By(unless_bad(-math.inf)), "returned -inf"),
    "text": (By(unless_bad("1.0")), r"returned '1\.0'"),
    "short": (
        Whole(lambda samples: [1.0 for s in samples if s.completion != "bad"]),
        "returned 2 scores for 3 samples",
    ),
}


@pytest.mark.parametrize(("reward", "message"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("on_error", ["drop", "zero"])
def test_a_sample_that_cannot_be_scored_is_named_and_the_others_keep_their_scores(reward, message, on_error, caplog):
    with caplog.at_level(logging.WARNING):
        out = score_samples(
            [
                WeightedReward(reward, weight=2.0, name="mine", on_error=on_error, timeout_s=0.2),
                WeightedReward(By(lambda sample: 1), name="sure"),
            ],
            SAMPLES,
        )
    assert "reward function mine" in caplog.text
    assert "sample 1 (prompt 'Q1?', completion 'bad')" in caplog.text
    assert caplog.text.count("WARNING") == 1
    if on_error == "drop":
        assert out.valid.tolist() == [True, False, True]
        assert out.total.tolist() == [3, 0, 3]
        assert out.breakdown["sure"].tolist() == [1, 0, 1]
    else:
        assert out.valid is None
        assert out.total.tolist() == [3, 1, 3]
        assert out.breakdown["mine"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(("reward", "message"), FAULTS.values(), ids=FAULTS)
def test_by_default_the_run_stops_and_names_the_sample_and_the_remedy(reward, message):
    with pytest.raises(UserError, match=rf"^reward function mine {message}.* on_error: drop or zero") as raised:
        score_samples([WeightedReward(reward, name="mine", timeout_s=0.2)], SAMPLES)
    if "returned 2" not in message:
        assert "sample 1 (prompt 'Q1?', completion 'bad')" in str(raised.value)


def test_a_hang_costs_its_own_sample_only_and_not_much_time():
    began = time.perf_counter()
    out = score_samples(
        [WeightedReward(By(unless_bad(lambda: time.sleep(30))), on_error="drop", timeout_s=0.1)], SAMPLES
    )
    assert time.perf_counter() - began < 10
    assert out.valid.tolist() == [True, False, True]


def test_only_a_few_of_many_failures_are_told_one_by_one(caplog):
    with caplog.at_level(logging.WARNING):
        out = score_samples([WeightedReward(By(lambda sample: math.nan), on_error="drop")], SAMPLES * 4)
    assert not out.valid.any()
    assert len(caplog.records) == 4
    assert "12 of 12 samples are dropped" in caplog.text


def test_token_scores_of_a_dropped_sample_are_nothing_and_of_a_zeroed_one_0():
    steps = By(lambda sample: [math.nan if sample.completion == "bad" else 2.0] * len(sample.tokens))
    dropped = score_samples([WeightedReward(steps, on_error="drop")], SAMPLES)
    assert [row.tolist() for row in dropped.per_token] == [[2], [], [2, 2, 2]]
    zeroed = score_samples([WeightedReward(steps, on_error="zero")], SAMPLES)
    assert [row.tolist() for row in zeroed.per_token] == [[2], [0, 0], [2, 2, 2]]
    assert zeroed.total.tolist() == [2, 0, 6]


class Async(RewardFn):
    async def __call__(self, samples):
        async def one(sample):
            await asyncio.sleep(30 if sample.completion == "bad" else 0.05)
            return 1.0

        return await asyncio.gather(*(one(sample) for sample in samples))


def test_async_functions_are_awaited_side_by_side_and_cancelled_at_the_limit():
    began = time.perf_counter()
    assert score_samples([WeightedReward(Async())], SAMPLES[::2] * 20).total.tolist() == [1] * 40
    out = score_samples([WeightedReward(Async(), on_error="zero", timeout_s=0.3)], SAMPLES)
    assert out.total.tolist() == [1, 0, 1]
    assert time.perf_counter() - began < 10


def test_an_async_function_inside_a_running_loop():
    async def notebook():
        return score_samples([WeightedReward(Async())], SAMPLES[:1])

    assert asyncio.run(notebook()).total.tolist() == [1]


def test_a_timeout_error_of_its_own_is_not_the_limit():
    async def gives_up(samples):
        raise TimeoutError("the server is away")

    with pytest.raises(UserError, match="raised TimeoutError: the server is away"):
        score_samples([WeightedReward(Whole(gives_up), timeout_s=5.0)], SAMPLES)


def test_a_users_own_mistake_is_never_a_samples_fault():
    def complain(sample):
        raise UserError("there is no column 'answer'")

    with pytest.raises(UserError, match="no column"):
        score_samples([WeightedReward(By(complain), on_error="drop")], SAMPLES)


def test_parts_are_kept_beside_the_score_and_not_added():
    both = Whole(lambda samples: DetailedScores([1.0] * 3, {"format": [0.0, 1.0, 2.0]}, [True, True, False]))
    out = score_samples([WeightedReward(both, weight=3.0, name="both")], SAMPLES)
    assert out.total.tolist() == [3, 3, 0]
    assert out.parts["both/format"].tolist() == [0, 1, 0]
    assert out.valid.tolist() == [True, True, False]


def test_a_part_that_is_no_number_is_a_fault_too():
    both = Whole(lambda samples: DetailedScores([1.0] * len(samples), {"format": [math.nan] * len(samples)}))
    with pytest.raises(UserError, match="its part both/format"):
        score_samples([WeightedReward(both, name="both")], SAMPLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, r"on_error='ignore' of reward By: use error, drop or zero"),
        ({"timeout_s": 0.0}, r"timeout_s=0\.0 of reward By"),
        ({"timeout_s": math.nan}, "timeout_s=nan"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        WeightedReward(By(lambda sample: 0), **options)
