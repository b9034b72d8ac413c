import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.pipelines.evaluate import EvaluatePolicies, Figure, evaluation_table, shown_figure
from rlhf_lightning.pipelines.files import read_jsonl
from rlhf_lightning.pipelines.sampling import Sampler
from rlhf_lightning.rollout.spec import GenerationSpec


class SaysGood(RewardFn):
    def __call__(self, samples):
        return [float("good" in sample.completion) for sample in samples]


class Words(RewardFn):
    def __call__(self, samples):
        return [float(len(sample.completion.split())) for sample in samples]


@pytest.fixture(scope="session")
def other_model(tmp_path_factory, tiny_tokenizer, tiny_config):
    spec = ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer), seed=1)
    return export_policy(load_policy(spec), load_tokenizer(spec), tmp_path_factory.mktemp("models") / "other")


@pytest.fixture
def job(tiny_model, other_model, write_jsonl, tmp_path):
    prompts = write_jsonl(
        "p.jsonl", [{"prompt": word} for word in ("the film was", "a plot", "not", "great", "[bold]")]
    )
    return EvaluatePolicies(
        models={"first": str(tiny_model), "second": str(other_model)},
        reference="first",
        scores={"good": SaysGood(), "words": Words()},
        prompts=prompts,
        out_dir=str(tmp_path),
        generation=GenerationSpec(max_new_tokens=6, temperature=0.7, num_samples=2),
        num_shown=2,
        prompts_at_once=3,
    )


def test_figures_are_those_of_the_answers(job, other_model, tiny_model, tmp_path):
    job.run()
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    figures = evaluation["models"]["second"]["figures"]
    # the same draws once more, in batches of the same size
    records = read_jsonl(job.prompts)
    sampler = Sampler.from_folder(str(other_model), job.generation, 0, 3)
    reference = load_policy(ModelSpec(path=str(tiny_model))).requires_grad_(False)
    samples, kl = [], []
    for answered in sampler(records, "evaluation"):
        samples += answered.samples
        for row, mask in zip(answered.answers.tokens, answered.answers.mask, strict=True):
            start = (row != sampler.tokenizer.pad_token_id).nonzero()[0, 0]
            kept = slice(start, mask.nonzero().max() + 1)
            ids, counts = row[kept][None], mask[kept][1:]
            own, ref = (m.model(input_ids=ids).logits[0, :-1] for m in (sampler.policy, reference))
            gap = torch.log_softmax(own / 0.7, -1) - torch.log_softmax(ref / 0.7, -1)
            kl.append(float(gap.gather(-1, ids[0, 1:, None])[:, 0][counts].sum()))
    assert figures["kl"]["mean"] == pytest.approx(sum(kl) / len(kl), abs=1e-4)
    words = [len(sample.completion.split()) for sample in samples]
    assert figures["words"]["mean"] == pytest.approx(sum(words) / len(words))
    assert figures["words"]["std"] == pytest.approx(torch.tensor(words).double().std(correction=0).item())
    assert figures["length"]["mean"] == pytest.approx(sum(len(sample.tokens) for sample in samples) / 10)
    shown = evaluation["samples"][1]["answers"]["second"]
    assert shown["completion"] == samples[2].completion
    assert shown["scores"]["words"] == words[2]


def test_the_reference_has_no_kl_to_itself(job, tmp_path):
    figures = job.run()
    assert figures["first/kl"] == pytest.approx(0, abs=1e-6)
    assert figures["second/kl"] > 0.1
    assert json.loads((tmp_path / "evaluation.json").read_text())["num_answers"] == 10


def test_the_table_shows_shares_in_percent_and_keeps_brackets(job, tmp_path):
    replace(job, models={"a[b]": job.models["first"]}, reference="a[b]").run()
    console = Console(width=80, record=True)
    console.print(evaluation_table(json.loads((tmp_path / "evaluation.json").read_text())))
    text = console.export_text()
    assert "a[b]" in text
    assert "%" in next(line for line in text.splitlines() if "good" in line)
    assert shown_figure("kl", {"mean": 2.0, "std": 0.5, "is_share": False}) == "2.00 ± 0.50"


def test_a_figure_by_hand():
    assert Figure.of([1, 2, 3, 6]) == Figure(3.0, pytest.approx((14 / 4) ** 0.5))


def test_the_reference_must_be_one_of_the_models(job):
    with pytest.raises(UserError, match="reference='third' is not among models: first, second"):
        replace(job, reference="third").run()
