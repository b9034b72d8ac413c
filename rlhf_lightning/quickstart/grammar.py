"""A small context-free grammar that both writes sentences and reads them, with a number as their meaning.

Rules are text, one symbol a line, so that a grammar can be read and edited as a document:

    Judgement -> 3 Adjective | 2 Degree Adjective :boost | "not" Adjective :flip
    Adjective -> good=0.5 | bad=-0.5 | "rather" "odd"

A number before an alternative is its weight when sentences are drawn (1 if none). A bare name is a symbol; quoted words
stand for themselves. `:name` says how the meanings of the parts become that of the whole (`sum` if none). A line of
`word=value` items is a lexicon: words that mean a number.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_ITEM = re.compile(r'"(?P<quoted>[^"]+)"|:(?P<meaning>\w+)|(?P<weight>\d+)(?=\s)|(?P<symbol>\w+)')

Meaning = Callable[[Sequence[float]], float]


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


MEANINGS: Mapping[str, Meaning] = {
    "sum": lambda parts: _clip(sum(parts)),
    "flip": lambda parts: -0.75 * sum(parts),
    "boost": lambda parts: _clip(1.4 * sum(parts)),
    "soften": lambda parts: 0.5 * sum(parts),
    # of the parts that say anything at all
    "mean": lambda parts: sum(parts) / max(1, sum(part != 0 for part in parts)),
    # whole phrases that mean more than their words
    "praise": lambda parts: 0.7,
    "blame": lambda parts: -0.7,
}
"""How the meanings of the parts combine. Negation turns a judgement round and weakens it: "not awful" is no praise."""


@dataclass(frozen=True)
class Production:
    """One way to write a symbol."""

    parts: tuple[str, ...]
    """Symbols, and words for themselves."""
    weight: float
    meaning: str


@dataclass(frozen=True)
class Grammar:
    """A grammar without left recursion."""

    productions: Mapping[str, tuple[Production, ...]]
    lexicons: Mapping[str, Mapping[str, float]]
    """Symbols that are single words, and what each word means."""

    @classmethod
    def from_text(cls, rules: str) -> "Grammar":
        """Read rules in the notation above; `#` starts a comment, a line that ends in `|` goes on in the next."""
        productions: dict[str, tuple[Production, ...]] = {}
        lexicons: dict[str, dict[str, float]] = {}
        text = re.sub(r"\|\s*\n", "| ", re.sub(r"#.*", "", rules))
        for line in filter(None, map(str.strip, text.splitlines())):
            name, _, body = (part.strip() for part in line.partition("->"))
            if "=" in body:
                items = (item.strip().partition("=") for item in body.split("|"))
                lexicons[name] = {word: float(value) for word, _, value in items}
            else:
                productions[name] = tuple(_read_alternative(alternative) for alternative in body.split("|"))
        return cls(productions, lexicons)

    @property
    def words(self) -> frozenset[str]:
        """Every word that a sentence may hold."""
        symbols = self.productions.keys() | self.lexicons.keys()
        parts = {part for options in self.productions.values() for option in options for part in option.parts}
        return frozenset(parts - symbols).union(*(lexicon for lexicon in self.lexicons.values()))

    def sample(self, symbol: str, rng: random.Random) -> tuple[list[str], float]:
        """Draw words for `symbol`; returns them and their meaning."""
        if symbol in self.lexicons:
            lexicon = self.lexicons[symbol]
            word = rng.choice(list(lexicon))
            return [word], lexicon[word]
        if symbol not in self.productions:
            return [symbol], 0.0
        options = self.productions[symbol]
        option = rng.choices(options, [option.weight for option in options])[0]
        drawn = [self.sample(part, rng) for part in option.parts]
        return [word for words, _ in drawn for word in words], MEANINGS[option.meaning]([value for _, value in drawn])

    def parse(self, symbol: str, words: Sequence[str]) -> float | None:
        """The meaning of `words` if they can be written for `symbol`, else None.

        Recursive descent with a memory: each symbol is read at most once at each word, so time is linear in the
        length for a fixed grammar. Of several readings the first counts.
        """
        return self._read(symbol, 0, tuple(words), {}).get(len(words))

    def _read(
        self, symbol: str, start: int, words: tuple[str, ...], memory: dict[tuple[str, int], dict[int, float]]
    ) -> dict[int, float]:
        """Where a reading of `symbol` from `start` may end, and what it then means."""
        if start >= len(words):
            return {}
        if symbol in self.lexicons:
            value = self.lexicons[symbol].get(words[start])
            return {} if value is None else {start + 1: value}
        if symbol not in self.productions:
            return {start + 1: 0.0} if words[start] == symbol else {}
        key = (symbol, start)
        if key not in memory:
            found: dict[int, float] = {}
            for option in self.productions[symbol]:
                readings: dict[int, tuple[float, ...]] = {start: ()}
                for part in option.parts:
                    readings = {
                        end: (*values, value)
                        for middle, values in readings.items()
                        for end, value in self._read(part, middle, words, memory).items()
                    }
                    if not readings:
                        break
                for end, values in readings.items():
                    found.setdefault(end, MEANINGS[option.meaning](values))
            memory[key] = found
        return memory[key]


def _read_alternative(text: str) -> Production:
    parts: list[str] = []
    weight, meaning = 1.0, "sum"
    for item in _ITEM.finditer(text.strip() + " "):
        if item["quoted"]:
            parts.extend(item["quoted"].split())
        elif item["meaning"]:
            meaning = item["meaning"]
        elif item["weight"]:
            weight = float(item["weight"])
        else:
            parts.append(item["symbol"])
    assert parts, f"empty alternative in {text!r}"
    assert meaning in MEANINGS, f"unknown meaning {meaning!r}"
    return Production(tuple(parts), weight, meaning)
