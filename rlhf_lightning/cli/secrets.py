"""Passwords and keys that must not come into a config: `config.yaml`, checkpoints and model cards would keep them."""

import os
import re

NAMES = re.compile(r"(?:^|_)(?:TOKEN|API_?KEY|ACCESS_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
"""Environment variables that hold one."""

SHORTEST = 8
"""Characters; shorter values stand in texts by chance."""

FORMS = {"a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"), "an API key": re.compile(r"\bsk-[\w-]{30,}")}


def secret_in(text: str) -> tuple[str, int] | None:
    """What secret a text holds, never its value, and where; None if it holds none.

    Args:
        text: a file, or a word of the command line.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and NAMES.search(name) and (at := text.find(value)) >= 0:
            return f"the value of the environment variable {name}", at
    for what, form in FORMS.items():
        if match := form.search(text):
            return what, match.start()
    return None


def remedy(what: str) -> str:
    """What is said of one."""
    return f"here is {what}, which config.yaml, checkpoints and model cards would keep: leave it to the environment"
