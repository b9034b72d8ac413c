"""Imports whole rooms, so that a YAML may name their classes without their modules."""

import pkgutil
from importlib import import_module


def import_rooms(*names: str) -> None:
    """Imports every module of the rooms: `import_rooms("rewards")` makes `class_path: RewardModelScore` known."""
    for name in names:
        package = import_module(f"rlhf_lightning.{name}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            import_module(module.name)
