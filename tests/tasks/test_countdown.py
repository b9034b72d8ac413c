import re

import pytest
from transformers import AutoTokenizer

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.pipelines.files import read_jsonl
from rlhf_lightning.rewards.arithmetic import calculate
from rlhf_lightning.rewards.countdown import Countdown
from rlhf_lightning.tasks.countdown import MakeCountdown, ways

IN_BRACKETS = r"\[([^\]]*)\]"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("countdown")
    job = MakeCountdown(str(folder), num_traces=300, num_prompts=60, num_val=20, seed=5)
    return folder, job.run(), job


def test_two_numbers_by_hand():
    assert {(way.expression, way.value) for way in ways([2, 6])} == {("6+2", 8), ("6*2", 12), ("6-2", 4), ("6/2", 3)}
    assert {way.expression for way in ways([5, 5])} == {"5+5", "5*5", "5/5"}  # no 0
    assert {way.expression for way in ways([3, 7])} == {"7+3", "7*3", "7-3"}  # no fraction


def test_every_way_is_worth_what_it_says_and_uses_every_number_once():
    found = ways([3, 25, 7])
    assert len(found) <= 108
    for way in found:
        value, used = calculate(way.expression)
        assert value == way.value
        assert sorted(used) == [3, 7, 25]
        for step in way.steps:
            left, right = step.split("=")
            assert calculate(left)[0] == int(right)
        assert way.steps[-1].endswith(f"={way.value}")
    assert 82 in {way.value for way in found}  # 25 * 3 + 7


def test_traces_miss_then_reach_and_the_reward_agrees(material):
    folder, *_ = material
    samples, misses = [], []
    for record in read_jsonl(folder / "sft.jsonl"):
        numbers, target = re.fullmatch(r"([\d ]+)=(\d+):", record["prompt"]).groups()
        *tried, reached, answer = record["completion"].split(";")
        assert reached.endswith(f"={target}")
        assert not any(way.endswith(f"={target}") for way in tried)
        assert calculate(answer[1:-1])[0] == int(target)
        misses.append(len(tried))
        columns = {"numbers": [int(n) for n in numbers.split()], "target": int(target)}
        samples.append(Sample(record["prompt"], record["completion"], record=columns, tokens=(), finished=True))
    assert set(misses) == {0, 1, 2, 3}
    assert Countdown(pattern=IN_BRACKETS)(samples).scores == [1.0] * 300


def test_no_problem_is_in_two_files(material):
    folder, figures, _ = material
    problems = []
    for name in ("prompts", "val"):
        problems += [(tuple(sorted(r["numbers"])), r["target"]) for r in read_jsonl(folder / f"{name}.jsonl")]
    for record in read_jsonl(folder / "sft.jsonl"):
        *numbers, target = map(int, re.findall(r"\d+", record["prompt"]))
        problems.append((tuple(sorted(numbers)), target))
    assert len(set(problems)) == len(problems) == figures["num_problems"] == 380


def test_the_tokenizer_knows_every_character(material):
    folder, figures, _ = material
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = [record["prompt"] + record["completion"] for record in read_jsonl(folder / "sft.jsonl")]
    ids = tokenizer(texts).input_ids
    assert tokenizer.batch_decode(ids) == texts
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert max(len(record["completion"]) for record in read_jsonl(folder / "sft.jsonl")) <= figures["longest_trace"]


def test_the_seed_names_the_draws(material, tmp_path):
    folder, _, job = material
    MakeCountdown(**{**vars(job), "out_dir": str(tmp_path / "again")}).run()
    assert (tmp_path / "again" / "sft.jsonl").read_text() == (folder / "sft.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"how_many": 5}, "how_many=5: use 2 to 4 numbers"),
        ({"largest_target": 9}, "largest_number=99, largest_target=9, max_misses=3: use at least 2, 10 and 0"),
        ({"largest_number": 4, "how_many": 2}, "there are few more than"),
    ],
)
def test_what_cannot_be_made_is_an_error(options, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        MakeCountdown(str(tmp_path), num_traces=100, num_prompts=10, num_val=10, **options).run()
