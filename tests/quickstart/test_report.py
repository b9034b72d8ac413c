import json
import re
from pathlib import Path

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.quickstart.report import WriteReport, _columns, _smooth


def figures(gold: float) -> dict:
    return {
        "gold": {"mean": gold, "std": 0.5, "is_share": False},
        "grammatical": {"mean": 0.96, "std": 0.2, "is_share": True},
        "kl": {"mean": 3.0 * gold, "std": 1.0, "is_share": False},
    }


@pytest.fixture
def job(tmp_path):
    models = {
        name: {"path": name, "figures": figures(gold), "ratings": {"gold": [gold - 0.5, gold, gold + 0.5]}}
        for name, gold in {"sft": 0.0, "ppo": 0.75}.items()
    }
    answers = {name: {"completion": f" <b>{name}</b> & so on.", "scores": {"gold": 0.5}} for name in models}
    evaluation = {
        "reference": "sft",
        "num_answers": 3,
        "generation": {"temperature": 0.7},
        "models": models,
        "samples": [{"prompt": "<script>alert(1)</script>", "answers": answers}],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    run = tmp_path / "ppo"
    run.mkdir()
    rows = "".join(f"{step},{step / 10},{'' if step % 5 else 0.3}\n" for step in range(60))
    (run / "metrics.csv").write_text("step,rollout/kl,val/loss\n" + rows)
    (run / "config.yaml").write_text("model: {init_args: {kl: {control: {init_args: {target: 4.0}}}}}\n# <i>\n")
    return WriteReport(str(tmp_path / "evaluation.json"), str(tmp_path / "out" / "report.html"), {"ppo": str(run)})


def test_the_page_needs_nothing_but_itself(job):
    html = Path(job.run()["report"]).read_text()
    assert html.count("data:image/svg+xml;base64,") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|https?://""", html)
    assert "0.00 → 0.75" in html
    assert "+1.5 standard deviations of sft" in html
    assert "96.0%" in html


def test_what_a_model_says_is_text_and_not_markup(job):
    html = Path(job.run()["report"]).read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;</span> &lt;b&gt;ppo&lt;/b&gt; &amp; so on." in html
    assert "# &lt;i&gt;" in html


def test_metrics_are_read_where_they_are(job):
    columns = _columns(Path(job.runs["ppo"]) / "metrics.csv")
    assert columns["rollout/kl"][0] == list(range(60))
    assert columns["val/loss"] == ([5.0 * i for i in range(12)], [0.3] * 12)


def test_smoothing_keeps_a_line_and_shortens_its_windows_at_the_ends():
    line = [float(i) for i in range(10)]
    assert _smooth(line)[1:-1] == line[1:-1]
    assert _smooth(line)[0] == 0.5


def test_mistakes_are_explained(job, tmp_path):
    with pytest.raises(UserError, match="run EvaluatePolicies first"):
        WriteReport(str(tmp_path / "none.json"), "x.html").run()
    with pytest.raises(UserError, match=r"not among the figures .* gold, grammatical, kl"):
        WriteReport(job.evaluation, "x.html", gold="golden").run()
    with pytest.raises(UserError, match=r"runs\.ppo: .* holds no metrics\.csv"):
        WriteReport(job.evaluation, str(tmp_path / "x.html"), {"ppo": str(tmp_path)}).run()
