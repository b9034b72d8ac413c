"""Prompts with answers that belong to other prompts: what KTO estimates its KL from.

Records stand in a circle, in the order of a hash of their tokens; each prompt gets the completion of the nearest record
before it that has another prompt. The circle is that of the whole data set, so a record's mismatched answer depends on
no file's order, no shuffling, no batch size and no number of ranks, and its reference log-probability can be measured
once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.encode import Encoded
from rlhf_lightning.data.items import UnpairedItem, compact
from rlhf_lightning.data.truncation import LengthRule, prompt_length_of


def with_mismatched(
    items: Sequence[UnpairedItem], rule: LengthRule, bos_id: int | None, name: str
) -> list[UnpairedItem]:
    """Every item with a completion of another prompt behind its own prompt.

    Args:
        items: the whole data set.
        rule: what is too long with the other completion is cut by it.
        bos_id: the token that is never cut from a prompt's beginning.
        name: of the data set, for the message.
    """
    prompts = [_prompt(item.encoded) for item in items]
    circle = sorted(range(len(items)), key=lambda i: _digest(items[i].encoded))
    partners = _partners(circle, [prompt.tobytes() for prompt in prompts])
    if partners is None:
        raise UserError(
            f"{name}: its {len(items)} records share one prompt, so no completion belongs to another prompt and the KL "
            "of the loss cannot be estimated: give records of at least two prompts, or a loss without a KL (BCO, "
            "APOZeroUnpaired)"
        )
    return [
        replace(item, mismatched=_behind(prompts[i], items[partners[i]].encoded, rule, bos_id))
        for i, item in enumerate(items)
    ]


def _partners(circle: Sequence[int], prompts: Sequence[bytes]) -> dict[int, int] | None:
    """For every record the nearest one before it in the circle with another prompt; None if there is but one prompt."""
    borders = [k for k in range(len(circle)) if prompts[circle[k - 1]] != prompts[circle[k]]]
    if not borders:
        return None
    partners: dict[int, int] = {}
    for k in range(borders[0], borders[0] + len(circle)):
        before, here = circle[(k - 1) % len(circle)], circle[k % len(circle)]
        partners[here] = before if prompts[before] != prompts[here] else partners[before]
    return partners


def _prompt(encoded: Encoded) -> np.ndarray:
    return np.asarray(encoded.ids[: prompt_length_of(encoded)], np.int32)


def _behind(prompt: np.ndarray, other: Encoded, rule: LengthRule, bos_id: int | None) -> Encoded:
    start = prompt_length_of(other)
    row = Encoded(
        [*prompt.tolist(), *np.asarray(other.ids)[start:].tolist()],
        [*[False] * len(prompt), *np.asarray(other.mask)[start:].tolist()],
    )
    if not rule.fits([row], len(prompt)):
        (row,) = rule.cut([row], len(prompt), int(len(prompt) > 0 and prompt[0] == bos_id))
    return compact(row)


def _digest(encoded: Encoded) -> bytes:
    ids = np.asarray(encoded.ids, np.int32).tobytes()
    return hashlib.blake2b(ids, digest_size=16, person=prompt_length_of(encoded).to_bytes(8, "little")).digest()
