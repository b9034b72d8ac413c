import os
import signal

import lightning as L
import pytest
import torch

from rlhf_lightning.callbacks import GracefulStop, LastCheckpoint, MetricsCSV
from rlhf_lightning.core.errors import Stopped


class Send(L.Callback):
    """Sends this process a signal, once or twice, in the middle of a batch."""

    def __init__(self, name: str, times: int = 1, batch: int = 0) -> None:
        self.name, self.times, self.batch = name, times, batch

    def on_before_zero_grad(self, trainer, module, optimizer):
        if trainer.fit_loop.batch_idx == self.batch:
            for _ in range(self.times):
                os.kill(os.getpid(), getattr(signal, self.name))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(name, code, sft, trainer_of, tmp_path, capfd):
    module, data = sft
    before = signal.getsignal(getattr(signal, name))
    logger = MetricsCSV(tmp_path)
    trainer = trainer_of(Send(name), GracefulStop(), LastCheckpoint(), logger=logger, max_epochs=3, log_every_n_steps=1)
    with pytest.raises(Stopped) as stopped:
        trainer.fit(module, datamodule=data)
    assert (stopped.value.code, stopped.value.signal) == (code, name)
    assert f"{name}: stopping after this optimiser step" in capfd.readouterr().err
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
    assert "--resume auto goes on from" in str(stopped.value)
    assert signal.getsignal(getattr(signal, name)) == before
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2  # the head, and the step that was finished


def test_a_step_of_several_micro_batches_is_finished_first(sft, trainer_of, tmp_path):
    module, data = sft
    trainer = trainer_of(Send("SIGTERM"), GracefulStop(), LastCheckpoint(), accumulate_grad_batches=2)
    with pytest.raises(Stopped):
        trainer.fit(module, datamodule=data)
    assert trainer.fit_loop.batch_idx == 1
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize(("name", "raised"), [("SIGTERM", Stopped), ("SIGINT", SystemExit)])
def test_a_second_signal_stops_at_once(name, raised, sft, trainer_of, tmp_path):
    module, data = sft
    with pytest.raises(raised) as stopped:
        trainer_of(Send(name, times=2), GracefulStop(), LastCheckpoint()).fit(module, datamodule=data)
    assert not (tmp_path / "checkpoints").exists()
    if raised is Stopped:
        assert "from the last checkpoint, if there is one" in str(stopped.value)


def test_without_checkpoints_it_still_stops(sft, trainer_of):
    module, data = sft
    with pytest.raises(Stopped) as stopped:
        trainer_of(Send("SIGTERM"), GracefulStop()).fit(module, datamodule=data)
    assert stopped.value.saved is None
