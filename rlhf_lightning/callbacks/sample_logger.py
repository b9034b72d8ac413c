"""What the model says: the same prompts before and after, as a table in the terminal and as samples.jsonl."""

from lightning.pytorch import Callback


class SampleLogger(Callback):
    """x."""
