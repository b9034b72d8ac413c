from dataclasses import replace

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.pipelines.files import read_jsonl
from rlhf_lightning.pipelines.sampling import SampleCompletions, SamplePrompts, Sampler, rate
from rlhf_lightning.rollout.spec import GenerationSpec


class Length(RewardFn):
    """Characters of the answer, plus what the record says."""

    def __call__(self, samples):
        return [len(sample.completion) + sample.record.get("bonus", 0) for sample in samples]


@pytest.fixture
def job(tiny_model, write_jsonl, tmp_path):
    prompts = write_jsonl(
        "p.jsonl", [{"prompt": "the film was", "bonus": 1000}, {"prompt": "a plot"}, {"prompt": "not"}]
    )
    return SampleCompletions(
        model=str(tiny_model),
        prompts=prompts,
        reward=Length(),
        out=str(tmp_path / "out.jsonl"),
        generation=GenerationSpec(max_new_tokens=8, num_samples=4),
        keep="all",
        prompts_at_once=2,
    )


def test_the_best_answer_of_each_prompt_is_kept(job):
    figures = job.run()
    every = read_jsonl(job.out)
    assert figures["num_records"] == len(every) == 12
    assert [record["prompt"] for record in every] == ["the film was"] * 4 + ["a plot"] * 4 + ["not"] * 4
    assert all(record["rating"] == len(record["completion"]) + record.get("bonus", 0) for record in every)
    figures = replace(job, keep="best").run()
    best = read_jsonl(job.out)
    assert [record["rating"] for record in best] == [
        max(record["rating"] for record in every[i : i + 4]) for i in (0, 4, 8)
    ]
    assert figures["kept_rating_mean"] >= figures["rating_mean"]


def test_the_random_control_keeps_one_answer_whatever_its_score(job):
    job.run()
    every = read_jsonl(job.out)
    replace(job, keep="random").run()
    assert read_jsonl(job.out) == every[::4]


def test_the_seed_names_the_draws(job):
    job.run()
    first = read_jsonl(job.out)
    job.run()
    assert read_jsonl(job.out) == first
    replace(job, seed=1).run()
    assert read_jsonl(job.out) != first


def test_cut_off_answers_can_be_passed_over(job):
    figures = replace(job, only_finished=True, generation=GenerationSpec(max_new_tokens=12, num_samples=8)).run()
    assert figures["num_records"] < 24
    with pytest.raises(UserError, match=r"raise generation\.max_new_tokens"):
        replace(job, only_finished=True, generation=GenerationSpec(max_new_tokens=2, min_new_tokens=2)).run()


def test_prompt_and_completion_join_to_what_was_sampled(tiny_model):
    sampler = Sampler.from_folder(str(tiny_model), GenerationSpec(max_new_tokens=6), seed=0, prompts_at_once=8)
    (answered,) = sampler([{"prompt": "the film was"}] * 8, "test")
    for row, sample in enumerate(answered.samples):
        real = answered.answers.tokens[row][answered.answers.attention_mask[row]]
        assert sample.prompt + sample.completion == sampler.tokenizer.decode(real, skip_special_tokens=True)
        assert sample.finished == (sample.tokens[-1] == sampler.tokenizer.eos_token_id)


def test_prompts_from_the_model_have_the_length_asked_for(tiny_model, tmp_path):
    job = SamplePrompts(
        model=str(tiny_model),
        out=str(tmp_path / "train.jsonl"),
        num_prompts=10,
        out_val=str(tmp_path / "val.jsonl"),
        num_val=5,
        num_tokens=3,
        distinct=True,
        rows_at_once=64,
    )
    figures = job.run()
    train, val = read_jsonl(job.out), read_jsonl(job.out_val)
    assert (len(train), len(val)) == (10, 5) == (figures["num_prompts"], figures["num_val"])
    prompts = [record["prompt"] for record in train + val]
    assert all(len(prompt.split()) == 3 for prompt in prompts)
    assert len(set(prompts)) == 15


def test_mistakes_are_explained(job, tmp_path, write_jsonl):
    with pytest.raises(UserError, match="no column 'prompt'; it has text"):
        replace(job, prompts=write_jsonl("q.jsonl", [{"text": "x"}])).run()
    with pytest.raises(UserError, match="give both or neither"):
        SamplePrompts(model="x", out="y", num_val=3).run()
    with pytest.raises(UserError, match="prompts_at_once=0"):
        replace(job, prompts_at_once=0).run()


def test_scores_of_a_function_that_fails_name_it(job):
    class Broken(RewardFn):
        def __call__(self, samples):
            return [float("nan")] * len(samples)

    with pytest.raises(UserError, match="Broken"):
        replace(job, reward=Broken()).run()
    assert rate(Length(), []) == []


def test_empty_answers_are_passed_over(job):
    replace(job, generation=GenerationSpec(max_new_tokens=1, num_samples=64)).run()
    every = read_jsonl(job.out)
    assert len(every) < 3 * 64
    assert all(record["completion"].strip() for record in every)
