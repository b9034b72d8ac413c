"""Turns jsonargparse's nested complaints into one sentence: the key, where it was set, the nearest right one."""

import re
from typing import Any

from rlhf_lightning.cli.sources import ConfigSources

UNKNOWN_OPTION = re.compile(r"[Oo]ption '([\w.]+)' is not accepted")
UNKNOWN_GROUP_KEY = re.compile(
    r"(?:Group|Key|Option) '([\w.]+)' (?:does not accept nested key|is not expected|does not)"
)


def explain(message: str, sources: ConfigSources, parser: Any) -> str:
    return message
