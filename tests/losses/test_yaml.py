"""Policy losses, credits and corrections as a YAML file names them."""

import inspect

import pytest
from jsonargparse import ArgumentParser

from rlhf_lightning import advantages, losses
from rlhf_lightning.advantages import Gdpo
from rlhf_lightning.core.interfaces import Credit, PolicyLoss
from rlhf_lightning.losses import DFT, NLL, Corrected, Reinforce, SamplerCorrection, SamplerFilter, SupervisedLoss


def offered(room, interface):
    found = [getattr(room, name) for name in room.__all__]
    found = [cls for cls in found if isinstance(cls, type) and issubclass(cls, interface)]
    return [cls for cls in found if not inspect.isabstract(cls)]


CHOICES = [(Credit, cls) for cls in offered(advantages, Credit)]
CHOICES += [(PolicyLoss, cls) for cls in offered(losses, PolicyLoss)]
CHOICES += [(SupervisedLoss, cls) for cls in (NLL, DFT)]


def read(kind, config):
    """The object that a config names, and the same after the config was written and read again."""
    parser = ArgumentParser()
    parser.add_argument("--choice", type=kind)
    first = parser.parse_object({"choice": config})
    again = parser.parse_string(parser.dump(first))
    return parser.instantiate(first).choice, parser.instantiate(again).choice


@pytest.mark.parametrize(("interface", "cls"), CHOICES, ids=lambda value: value.__name__)
def test_the_name_is_enough(interface, cls):
    assert read(interface, {"class_path": cls.__name__}) == (cls(), cls())


def test_there_are_choices():
    assert len(CHOICES) > 20


def test_options_reach_their_objects():
    weights = {"correct": 2.0, "short": 0.5}
    read_gdpo = read(Credit, {"class_path": "Gdpo", "init_args": {"weights": weights}})
    assert read_gdpo == (Gdpo(weights=weights), Gdpo(weights=weights))
    icepop = {"cap": None, "keep": "token", "low": 0.5, "high": 5.0}
    assert read(SamplerCorrection, icepop)[0] == SamplerCorrection(**icepop)
    bypass = {"loss": {"class_path": "Reinforce"}, "correction": {"cap": 1.5, "normalise": True}}
    read_bypass = read(PolicyLoss, {"class_path": "Corrected", "init_args": bypass})
    assert read_bypass[0] == Corrected(Reinforce(), SamplerCorrection(cap=1.5, normalise=True))
    region = {"measure": "binary_kl", "over": "mean", "high": 0.05}
    assert read(SamplerCorrection, {"filters": [region]})[0] == SamplerCorrection(filters=[SamplerFilter(**region)])


@pytest.mark.parametrize(
    ("interface", "name", "wrong"),
    [
        (Credit, "GroupNormalised", {"std_over": "world"}),
        (PolicyLoss, "Dppo", {"divergence": "js"}),
        (PolicyLoss, "ClippedSurrogate", {"ratio": "word"}),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(interface, name, wrong):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--choice", type=interface)
    with pytest.raises(Exception, match=next(iter(wrong.values()))):
        parser.parse_object({"choice": {"class_path": name, "init_args": wrong}})
