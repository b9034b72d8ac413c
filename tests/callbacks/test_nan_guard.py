import json
import math

import pytest
import torch

from rlhf_lightning import ModelSpec, RLHFDataModule, SFTModule
from rlhf_lightning.callbacks import LastCheckpoint, MetricsCSV, NaNGuard
from rlhf_lightning.callbacks.nan_guard import all_finite, plain
from rlhf_lightning.core.errors import UserError


class Poisoned(SFTModule):
    """Its loss is multiplied by `factor` on the micro-batches in `at`, counted from the start of the run."""

    factor, at, seen = math.nan, (), 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen += 1
        return loss * self.factor if self.seen - 1 in self.at else loss


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)


@pytest.fixture
def poisoned(tmp_path, tiny_model, write_jsonl):
    def make(at, factor=math.nan):
        words = ["good", "bad", "long", "short"]
        records = [{"prompt": f"the {word} film", "completion": f" was {word}"} for word in words]
        data = RLHFDataModule(train=write_jsonl("train.jsonl", records), batch_size=1, shuffle=False)
        module = Poisoned(ModelSpec(path=str(tiny_model)), optimizer=adamw, seed=0)
        module.at, module.factor = at, factor
        return module, data

    return make


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [2, 3])
def test_a_step_that_is_not_finite_changes_nothing(factor, bad, poisoned, trainer_of, tmp_path, capfd):
    """Two micro-batches a step; one of the second step's is bad. Without that step the run ends with the same bits."""

    class Look(NaNGuard):
        def on_before_zero_grad(self, trainer, module, optimizer):
            if trainer.fit_loop.batch_idx == 1:
                self.before = weights(module), [s["exp_avg"].clone() for s in optimizer.state.values()]

    module, data = poisoned((bad,), factor)
    guard = Look()
    trainer = trainer_of(guard, LastCheckpoint(), accumulate_grad_batches=2, logger=MetricsCSV(tmp_path))
    trainer.fit(module, datamodule=data)
    after = weights(module)
    assert trainer.global_step == 2
    assert all(torch.isfinite(value).all() for value in after.values())
    moments = [s["exp_avg"] for s in trainer.optimizers[0].state.values()]
    assert {int(s["step"]) for s in trainer.optimizers[0].state.values()} == {1}
    alone, data = poisoned(())
    trainer_of(accumulate_grad_batches=2, limit_train_batches=2).fit(alone, datamodule=data)
    assert all(torch.equal(after[name], value) for name, value in weights(alone).items())
    assert moments
    said = capfd.readouterr().err
    assert "step 1 refused: 1 of 2 micro-batches have a loss of" in said
    kept = torch.load(tmp_path / "nonfinite/step-1-rank-0.pt", weights_only=True)["batches"]
    assert len(kept) == 1  # only the micro-batch that was bad
    word = module.tokenizer.decode(kept[0]["tokens"][0])
    assert ("long" if bad == 2 else "short") in word
    report = json.loads((tmp_path / "nonfinite/step-1-rank-0.json").read_text())
    assert len(report["losses"]) == 2
    assert report["gradients"]
    assert not report["weights"]
    assert "health/refused_steps" in (tmp_path / "metrics.csv").read_text()


def test_without_the_guard_the_weights_are_lost(poisoned, trainer_of):
    module, data = poisoned((1,))
    trainer_of().fit(module, datamodule=data)
    assert not all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_several_in_a_row_end_the_run_with_a_diagnosis(poisoned, trainer_of, tmp_path):
    module, data = poisoned((1, 2))
    with pytest.raises(UserError, match=r"2 optimiser steps in a row were refused, .*at step 2.*the loss is n"):
        trainer_of(NaNGuard(stop_after=2)).fit(module, datamodule=data)
    assert sorted(file.name for file in (tmp_path / "nonfinite").glob("*.pt")) == [
        "step-1-rank-0.pt",
        "step-2-rank-0.pt",
    ]


def test_refused_steps_that_are_not_in_a_row_do_not_end_it(poisoned, trainer_of):
    module, data = poisoned((0, 2))
    trainer = trainer_of(NaNGuard(stop_after=2))
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4


def test_a_gradient_alone_is_enough(poisoned, trainer_of, tmp_path):
    module, data = poisoned(())
    module.configure_model()
    name, parameter = next(iter(module.named_parameters()))
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"Weights and loss are finite and the gradient is not: lower"):
        trainer_of(NaNGuard(stop_after=1)).fit(module, datamodule=data)
    assert json.loads((tmp_path / "nonfinite/step-0-rank-0.json").read_text())["gradients"] == [name]


def test_weights_that_came_like_this_are_named(poisoned, trainer_of):
    module, data = poisoned(())
    module.configure_model()
    next(iter(module.parameters())).data.fill_(math.nan)
    with pytest.raises(UserError, match=r"The weights themselves are not finite"):
        trainer_of(NaNGuard(stop_after=1)).fit(module, datamodule=data)


def test_an_on_policy_stage_is_guarded_too(ppo, trainer_of, tmp_path):
    module, data = ppo
    loss = module.value_loss
    module.value_loss = lambda *args: (loss(*args)[0] * math.nan, loss(*args)[1])
    with pytest.raises(UserError, match="2 optimiser steps in a row"):
        trainer_of(NaNGuard(stop_after=2)).fit(module, datamodule=data)
    kept = torch.load(tmp_path / "nonfinite/step-0-rank-0.pt", weights_only=True)["batches"]
    assert kept[0]["scores"].shape[0] == 2


def test_large_numbers_are_finite():
    large = torch.full((10,), 3e38)
    assert bool(all_finite([large, large.to(torch.bfloat16), torch.tensor(1.0, dtype=torch.float64)]))
    assert not bool(all_finite([large, torch.tensor([1.0, math.nan], dtype=torch.bfloat16)]))
    assert bool(all_finite([]))


def test_batches_are_kept_as_plain_values():
    assert plain({"a": (1, None, "x", object)}) == {"a": [1, None, "x", str(object)]}


def test_the_limit_is_checked():
    with pytest.raises(UserError, match="stop_after=0"):
        NaNGuard(stop_after=0)
