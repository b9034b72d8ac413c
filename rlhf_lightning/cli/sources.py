"""The YAML files of a command line, with line numbers: where each key was set, and what would pass without a word."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rlhf_lightning.core.errors import UserError

CONFIG_FLAGS = {"-c": "", "--config": "", "--model": "model", "--data": "data", "--trainer": "trainer"}
"""Options that take a YAML file, and the key that the file's contents stand under."""

CALLABLE_KEYS = {"class_path"}
"""Keys whose value is imported."""

STANDARD_LIBRARY_ALLOWED = {"datetime", "pathlib", "typing", "fractions", "decimal"}


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

    @classmethod
    def of_command_line(cls, args: Sequence[str]) -> "ConfigSources":
        sources = cls()
        position = 0
        while position < len(args):
            option, equals, value = args[position].partition("=")
            if option.startswith("-") and not equals and position + 1 < len(args):
                value = args[position + 1]
            if option in CONFIG_FLAGS and value.endswith((".yaml", ".yml", ".json")):
                sources._read(Path(value), CONFIG_FLAGS[option])
            elif option.startswith("--"):
                sources.places.append(Place(option[2:].rstrip("+"), "", 0, value))
            position += 1
        return sources

    def where(self, key: str) -> Place | None:
        """The last place that set `key`; failing that, one that set a key ending in it.

        init_args and class_path levels may be left out of `key`.
        """
        wanted = short_key(key)
        for matches in (lambda short: short == wanted, lambda short: short.endswith("." + wanted)):
            best: Place | None = None
            for place in reversed(self.places):
                if best is None and matches(short_key(place.key)):
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
            root = place.value.replace(":", ".").split(".", 1)[0]
            imports = (leaf in CALLABLE_KEYS and "." in place.value) or self._is_function(place)
            if imports and root in sys.stdlib_module_names and root not in STANDARD_LIBRARY_ALLOWED:
                raise UserError(
                    f"{place}: {place.key}: {place.value} is Python's own, not a class or function made for training; "
                    "name one of yours"
                )

    def _is_function(self, place: Place) -> bool:
        """Whether the place names the function of a `PythonFunction`."""
        owner = place.key.removesuffix(".path").removesuffix(".init_args") + ".class_path"
        beside = (other for other in self.places if other.file == place.file and other.key == owner)
        return place.key.endswith(".path") and any(other.value.endswith("PythonFunction") for other in beside)

    # --- reading

    def _read(self, path: Path, prefix: str) -> None:
        if not path.exists():
            self.problems.append(f"{path}: no such config file")
            return
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
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
        if root is None:
            self.problems.append(f"{path}: the file is empty; a config has keys such as trainer, model and data")
        elif not isinstance(root, yaml.MappingNode):
            self.problems.append(f"{path}: a config is a mapping of keys such as trainer, model and data")
        else:
            self.places.extend(self._walk(root, prefix, str(path)))

    def _walk(self, node: yaml.Node, prefix: str, file: str) -> Iterator[Place]:
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key_node, value_node in node.value:
                name, line = str(key_node.value), key_node.start_mark.line + 1
                key = f"{prefix}.{name}" if prefix else name
                if name in seen:
                    self.problems.append(f"{file}:{line}: {key} is set twice, first in line {seen[name]}; keep one")
                seen[name] = line
                value = value_node.value if isinstance(value_node, yaml.ScalarNode) else ""
                yield Place(key, file, line, value)
                self._check_scalar(value_node, key, file)
                yield from self._walk(value_node, key, file)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._check_scalar(item, f"{prefix}[{index}]", file)
                yield from self._walk(item, prefix, file)

    def _check_scalar(self, node: yaml.Node, key: str, file: str) -> None:
        where = f"{file}:{node.start_mark.line + 1}: {key}"
        if node.tag.startswith("tag:yaml.org,2002:python") or node.tag.startswith("!"):
            self.problems.append(f"{where}: the YAML tag {node.tag} is not allowed; write a plain value or class_path")
        if not isinstance(node, yaml.ScalarNode):
            return
        if node.tag.endswith(":float") and node.value.lower().lstrip("+-") == ".nan":
            self.problems.append(f"{where}: {node.value} is not a number")


def short_key(key: str) -> str:
    """The key without its class_path / init_args levels: model.init_args.policy.path -> model.policy.path."""
    return ".".join(part for part in key.split(".") if part not in ("init_args", "dict_kwargs"))
