"""The bar with phases, and lines where there is no terminal."""

import io

from rich.console import Console

from rlhf_lightning.callbacks import RolloutProgress
from rlhf_lightning.callbacks.progress import format_number


def test_without_a_terminal_there_are_lines_with_metrics(sft, trainer_of, capsys):
    trainer_of(RolloutProgress(line_every_seconds=0.0), enable_progress_bar=True).fit(*sft)
    lines = [line for line in capsys.readouterr().out.splitlines() if " epoch " in line]
    assert len(lines) == 2
    assert "batch 2/2 step 2" in lines[-1]
    assert "train/loss" in lines[-1]
    assert "\x1b" not in "".join(lines)


def test_a_terminal_sees_the_phases_of_a_rollout(ppo, trainer_of, monkeypatch):
    screen = io.StringIO()
    bar = RolloutProgress()
    bar._plain = bar._wants_lines = False
    bar._console_kwargs = {"file": screen, "force_terminal": True, "width": 120}
    seen = []
    monkeypatch.setattr(bar, "_get_train_description", lambda epoch: seen.append(bar._phase) or f"E {bar._phase}")
    trainer_of(bar, enable_progress_bar=True).fit(*ppo)
    assert [phase for phase in ("generate", "score", "measure") if phase in seen] == ["generate", "score", "measure"]
    assert "E generate" in screen.getvalue()
    assert bar._phase == ""


def test_refresh_rate_0_is_silent(sft, trainer_of, capsys):
    trainer_of(RolloutProgress(refresh_rate=0, line_every_seconds=0.0), enable_progress_bar=True).fit(*sft)
    assert " epoch " not in capsys.readouterr().out


def test_numbers_are_short():
    assert (format_number(1 / 3), format_number(123456.0), format_number("x")) == ("0.3333", "1.235e+05", "x")
    assert not Console(file=io.StringIO()).is_terminal
