"""Importing verl and OpenRLHF leaves the process as it was."""

import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peer_packages import PEERS, STAND_INS, peer_file, peer_module

NAMES = [
    "verl.trainer.ppo.core_algos",
    "verl.trainer.ppo.rollout_corr_helper",
    "verl.trainer.ppo.ray_trainer",
    "openrlhf.models.loss",
    "openrlhf.models.utils",
    "openrlhf.trainer.ppo_utils.experience_maker",
    "openrlhf.trainer.ppo_utils.kl_controller",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_peers_module_is_imported_and_nothing_else_is_changed(name):
    from transformers.utils import is_flash_attn_2_available
    from transformers.utils.import_utils import is_flash_linear_attention_available

    def state():
        root = (logging.root.level, list(logging.root.handlers), logging.root.manager.disable)
        return dict(os.environ), sys.path[:], sys.meta_path[:], root, set(torch.serialization.get_safe_globals())

    before, absent = state(), {package for package in STAND_INS if package not in sys.modules}
    module = peer_module(name)
    assert module.__file__.startswith(str(PEERS))
    assert peer_module(name) is module
    assert state() == before
    assert not absent & set(sys.modules)
    for package in {"scripts", "orjson", *absent} - set(sys.modules):
        assert not str(getattr(find_spec(package), "origin", "")).startswith(str(PEERS))
    assert not is_flash_attn_2_available()
    assert not is_flash_linear_attention_available()


def test_what_is_compared_with_is_what_is_pinned():
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"verl", "openrlhf"} <= set(pinned)
    peer_file(f"verl-{pinned['verl']}.dist-info/METADATA")
    found = {path.name.removesuffix(".dist-info") for path in PEERS.glob("*.dist-info")}
    assert found == {f"{name}-{version}" for name, version in pinned.items()}


def test_what_is_not_there_is_skipped_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("peer_packages.PEERS", tmp_path)
    with pytest.raises(pytest.skip.Exception, match="make setup"):
        peer_module("verl.never_imported")
    with pytest.raises(pytest.skip.Exception, match="make setup"):
        peer_file("verl/trainer/config/ppo_trainer.yaml")
