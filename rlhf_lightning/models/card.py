"""The README.md of an exported model: what it is, how it was made, how it did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ModelCard:
    """What a reader of the export should know."""

    title: str = "Untitled model"
    stage: str = ""
    """The stage that trained it: SFTModule, RewardModule, PPOModule."""
    config_yaml: str = ""
    """The run's whole config."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The run's last metrics."""
    base_model: str | None = None
    """Folder or hub id that the training started from."""


def write_card(folder: Path, card: ModelCard, *, usage: str, notes: list[str]) -> None:
    """Write `folder`/README.md.

    Args:
        usage: Python that loads the model.
        notes: what loading it elsewhere would not tell.
    """
    # a card's base_model must be a hub id: a folder of this machine means nothing to a reader elsewhere
    on_hub = card.base_model is not None and not Path(card.base_model).expanduser().exists()
    head = ["---", "library_name: transformers", "tags: [rlhf-lightning]"]
    head += [f"base_model: {card.base_model}"] if on_hub else []
    parts = ["\n".join([*head, "---"]), f"# {card.title}"]
    origin = [f"Trained by `{card.stage}` of rlhf-lightning"] if card.stage else ["Written by rlhf-lightning"]
    origin += [f"from `{card.base_model}`"] if card.base_model else []
    parts.append(" ".join(origin) + ".")
    parts += [f"- {note}" for note in notes]
    parts.append(f"## Use\n\n```python\n{usage.strip()}\n```")
    if card.figures:
        rows = [f"| {name} | {value:.6g} |" for name, value in card.figures.items()]
        parts.append("\n".join(["## Figures\n", "| metric | value |", "|---|---|", *rows]))
    if card.config_yaml:
        parts.append(f"## Config\n\n```yaml\n{card.config_yaml.strip()}\n```")
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
