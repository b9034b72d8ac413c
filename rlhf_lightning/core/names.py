"""Names of models and data sets: a folder of ours, or an id on a hub, and never one taken for the other."""

from pathlib import Path

HUB = "hf://"
"""In front of a name: the hub, whatever lies here."""

OURS = ("runs", "models", "data", "checkpoints", "outputs", "datasets", "configs")
"""First parts of a path that are folders here, also where there are none: else who takes `runs` on the hub is read."""


def hub_id(name: str) -> str | None:
    """The id of a name that can only be on the hub; None if it says nothing of the kind."""
    return name.removeprefix(HUB) if name.startswith(HUB) else None


def without_hub(name: str, *, is_data: bool = False) -> str:
    """What to do about a hub id that could not be read."""
    kind = " --repo-type dataset" if is_data else ""
    return (
        f"; no folder of that name is here. Without a network, fetch it where there is one (hf download{kind} "
        f"{name.removeprefix(HUB)} --local-dir FOLDER) and give FOLDER"
    )


def looks_like_a_path(name: str) -> bool:
    """Whether a name without a file or folder behind it was meant as one, and not as owner/name on a hub."""
    parts = Path(name).parts
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or "://" in name
        or name.endswith("/")
        or len(parts) > 2
        or (len(parts) == 2 and (parts[0] in OURS or Path(parts[0]).is_dir()))
    )
