"""Checks of a parsed config that no type can express, and of keys that would do nothing."""

from typing import Any

from rlhf_lightning.cli.sources import ConfigSources


def check_config(config: Any, sources: ConfigSources) -> None: ...
def check_trainer_names(config: Any, sources: ConfigSources) -> None: ...
def check_instances(model: Any, data: Any, sources: ConfigSources) -> None: ...
