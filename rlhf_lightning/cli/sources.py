"""The YAML files of a command line, with line numbers: where each key was set, and what would pass without a word."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import yaml

from rlhf_lightning.cli.secrets import remedy, secret_in
from rlhf_lightning.core import trust
from rlhf_lightning.core.errors import UserError

CONFIG_FLAGS = {"-c": "", "--config": "", "--model": "model", "--data": "data", "--trainer": "trainer"}
"""Options that take a YAML file, and the key that the file's contents stand under."""

DEEPEST = 60
LARGEST = 100_000
"""Keys and items of one file: a config has hundreds, a file whose aliases multiply has billions."""


@dataclass(frozen=True)
class Place:
    """A key in a file or on the command line."""

    key: str
    """Dotted, from the root of the config: trainer.max_epochs."""
    file: str
    """The YAML file; empty for the command line."""
    line: int
    value: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "command line"


@dataclass(frozen=True)
class ConfigSources:
    """Every key that a command line and its YAML files set, in order: the last one of a key wins."""

    places: list[Place] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _walked: Iterator[int] = field(default_factory=count)
    _inner_files: list[Path] = field(default_factory=list)

    @classmethod
    def of_command_line(cls, args: Sequence[str]) -> "ConfigSources":
        sources = cls()
        position = 0
        while position < len(args):
            if (secret := secret_in(args[position])) is not None:
                raise UserError(f"command line, word {position + 1}: {remedy(secret[0])}")
            option, equals, value = args[position].partition("=")
            if option.startswith("-") and not equals and position + 1 < len(args):
                value = args[position + 1]
            whole = CONFIG_FLAGS.get(option) == "" and _is_file(value)
            if whole or (option in CONFIG_FLAGS and value.endswith((".yaml", ".yml", ".json"))):
                sources._read(Path(value), CONFIG_FLAGS[option])
            elif option.startswith("--"):
                key = option[2:].rstrip("+")
                sources.places.append(Place(key, "", 0, value))
                sources.places.extend(sources._inside(value, key, "", 0))
            position += 1
        return sources

    def where(self, key: str) -> Place | None:
        """The last place that set `key`; failing that, one that set a key ending in it.

        init_args and class_path levels may be left out of `key`.
        """
        wanted = short_key(key)
        owner = wanted.removesuffix(".class_path") if wanted.endswith(".class_path") else None
        for matches in (lambda short: short == wanted, lambda short: short.endswith("." + wanted)):
            best: Place | None = None
            for place in reversed(self.places):
                named = place.value and place.value[0] not in "{["  # --model.loss IPO sets model.loss.class_path
                if best is None and (matches(short := short_key(place.key)) or (short == owner and named)):
                    best = place
                elif best is not None and best.key.startswith(place.key + ".") and short_key(place.key) == wanted:
                    best = place  # policy rather than policy.init_args
            if best is not None:
                return best
        return None

    def check(self) -> None:
        """Raises `UserError` for what YAML or jsonargparse would let pass without a word."""
        if self.problems:
            raise UserError("\n  ".join(self.problems))
        for place in self.places:
            leaf = place.key.rpartition(".")[2]
            if leaf == "class_path" or place.key == "model":
                self._check_class(place)
            if leaf == "path" and self._of_python_function(place):
                self._check_function(place)

    def _check_class(self, place: Place) -> None:
        if "." in place.value and trust.is_dotted(place.value) and not trust.allows(place.value):
            raise UserError(f"{place}: {place.key}: {trust.refusal(place.value)}")

    def _check_function(self, place: Place) -> None:
        """The function of a `PythonFunction`: our own packages, too, have some that run what they are told to."""
        home = place.value.rpartition(":" if ":" in place.value else ".")[0]
        if home and not trust.allows_function(home):
            raise UserError(f"{place}: {place.key}: {trust.function_refusal(place.value, home)}")

    def _of_python_function(self, place: Place) -> bool:
        owner = place.key.removesuffix(".path").removesuffix(".init_args")
        beside = [other for other in self.places if other.file == place.file]
        return any(
            (other.key == f"{owner}.class_path" or other.key == owner) and other.value.endswith("PythonFunction")
            for other in beside
        )

    # --- reading

    def _read(self, path: Path, prefix: str) -> None:
        if not path.exists():
            self.problems.append(f"{path}: no such config file")
            return
        try:
            text = path.read_text(encoding="utf-8")
            if (secret := secret_in(text)) is not None:
                line = text.count("\n", 0, secret[1]) + 1
                self.problems.append(f"{path}:{line}: {remedy(secret[0])}")
                return
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            self.problems.append(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")
            return
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.problems.append(f"{path}:{mark.line + 1 if mark else '?'}: not YAML: {error.problem}")
            return
        except yaml.YAMLError as error:  # characters that no text has
            self.problems.append(f"{path}: not YAML: {str(error).splitlines()[0]}")
            return
        except RecursionError:
            self.problems.append(f"{path}: nested too deeply to be a config")
            return
        if root is None:
            self.problems.append(f"{path}: the file is empty; a config has keys such as trainer, model and data")
        elif not isinstance(root, yaml.MappingNode):
            self.problems.append(f"{path}: a config is a mapping of keys such as trainer, model and data")
        else:
            self.places.extend(self._walk(root, prefix, str(path)))

    def _walk(
        self, node: yaml.Node, prefix: str, file: str, depth: int = 0, line: int | None = None
    ) -> Iterator[Place]:
        """Every key below a node; `line` is where the text stands that the node was read from, if it is no file."""
        # aliases (*name) come by again wherever they stand: few bytes may be a config without an end
        if depth > DEEPEST or next(self._walked) > LARGEST:
            where = f"{_where(file, node, line)}: {prefix[:60]}"
            raise UserError(f"{where}: no config is as deep or as large as this one becomes; write its aliases (*) out")
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key_node, value_node in node.value:
                name, here = str(key_node.value), line or key_node.start_mark.line + 1
                key = f"{prefix}.{name}" if prefix else name
                if name in seen:
                    twice = f"{key} is set twice, first in line {seen[name]}; keep one"
                    self.problems.append(f"{_where(file, key_node, line)}: {twice}")
                seen[name] = here
                value = value_node.value if isinstance(value_node, yaml.ScalarNode) else ""
                yield Place(key, file, here, value)
                self._check_scalar(key_node, f"{_where(file, key_node, line)}: {key}")
                self._check_scalar(value_node, f"{_where(file, value_node, line)}: {key}")
                yield from self._inside(value, key, file, here)
                yield from self._walk(value_node, key, file, depth + 1, line)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._check_scalar(item, f"{_where(file, item, line)}: {prefix}[{index}]")
                if isinstance(item, yaml.ScalarNode):
                    yield from self._inside(item.value, prefix, file, line or item.start_mark.line + 1)
                yield from self._walk(item, prefix, file, depth + 1, line)

    def _inside(self, text: str, key: str, file: str, line: int) -> Iterator[Place]:
        """What the parser reads as a piece of config although it is a text: quoted YAML or JSON, a file's name."""
        if "class_path" in text or (not file and text.startswith(("{", "["))):
            try:
                node = yaml.compose(text, Loader=yaml.SafeLoader)
            except (yaml.YAMLError, RecursionError):
                return
            if isinstance(node, yaml.MappingNode | yaml.SequenceNode):
                yield from self._walk(node, key, file, line=line)
        elif text.endswith((".yaml", ".yml")) and key.partition(".")[0] in ("model", "trainer"):
            beside = Path(file).parent / text
            inner = beside if beside.is_file() else Path(text)
            if inner.is_file() and inner not in self._inner_files:
                self._inner_files.append(inner)
                self._read(inner, key)

    def _check_scalar(self, node: yaml.Node, where: str) -> None:
        if node.tag.startswith("tag:yaml.org,2002:python") or node.tag.startswith("!"):
            self.problems.append(f"{where}: the YAML tag {node.tag} is not allowed; write a plain value or class_path")
        if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith(":float"):
            return
        if node.value.lower().lstrip("+-") in (".nan", ".inf"):
            self.problems.append(f"{where}: {node.value} is not a number that anything can be computed with")


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # a whole config, too long to be a name
        return False


def _where(file: str, node: yaml.Node, line: int | None) -> str:
    return f"{file}:{line or node.start_mark.line + 1}" if file else "command line"


def short_key(key: str) -> str:
    """The key without its class_path / init_args levels: model.init_args.policy.path -> model.policy.path."""
    return ".".join(part for part in key.split(".") if part not in ("init_args", "dict_kwargs"))
