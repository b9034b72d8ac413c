"""A Trainer with three more things to do: answer prompts, show records, export."""

from lightning.pytorch import Trainer


class RLHFTrainer(Trainer):
    """Lightning's Trainer; `generate`, `preview` and `export` are subcommands as `fit` is."""

    def generate(self, model, datamodule) -> None:
        """x."""

    def preview(self, model, datamodule) -> None:
        """x."""

    def export(self, model, datamodule) -> None:
        """x."""
