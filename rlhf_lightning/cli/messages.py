"""Turns jsonargparse's nested complaints into one sentence: the key, its place, what is wrong, the nearest name."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from rlhf_lightning.cli.options import class_of, in_other_packages, known_classes, valid_children, wanted_bases
from rlhf_lightning.cli.sources import ConfigSources, Place, short_key
from rlhf_lightning.cli.trl_names import OURS
from rlhf_lightning.core import trust
from rlhf_lightning.core.errors import UserError

BOILERPLATE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Given value|Not a valid subclass|Subclass types expect|"
    r"a class path \(str\)|a dict with|a dict without|Expected a <class 'NoneType'>|Expected a path but|$"
)
UNKNOWN = (
    re.compile(r"Subcommand '\w+' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
)
WRONG_TYPE = re.compile(r"Expected (?:a|an) (?P<type>.+?)\.? Got value: (?P<value>.*)")
WRONG_TYPE_OF_UNION = re.compile(r"Expected (?:a|an) <class '(?P<type>[^']+)'>$")
LITERAL = re.compile(r"Literal\[(?P<options>.*)\]")
LITERAL_OF_UNION = re.compile(r"Expected a typing\.Literal\[(?P<options>.*)\]$")
MISSING = re.compile(r"arguments are required: (?P<key>\S+)")
NO_STAGE = re.compile(r"Given value: NestedArg\(key='(?P<key>[\w.]+)'")
UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)$")
DENIED = re.compile(r"Importing '(?P<path>[\w.]+)' is not allowed, denied by")
BROKEN_CLASS = re.compile(r"Problem with given class_path '(?P<path>[\w.]+)':$")
NO_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong, and the key it is about."""

    key: str
    text: str


def explain(message: str, sources: ConfigSources, parser: Any) -> str:
    """One readable sentence for a parser's error message.

    Args:
        message: what the parser says.
        sources: where keys were set.
        parser: of the subcommand; knows the options of trainer and data.
    """
    complaints = _complaints(message)
    for complaint in complaints:
        if (match := MISSING.search(complaint.text)) and complaint.key:
            return f"{_at(complaint.key, sources)}: {match['key']} is missing there"
    if match := MISSING.search(message):
        key = match["key"].partition(".")[2] or match["key"]
        return f"{key} is missing: set it in the YAML file or by --{key}"
    for complaint in complaints:
        if match := DENIED.search(complaint.text):
            return f"{_at(complaint.key, sources)}: {trust.refusal(match['path'])}"
    for complaint in complaints:
        for pattern in UNKNOWN:
            if match := pattern.search(complaint.text):
                parts = [complaint.key, match.groupdict().get("group"), match["key"]]
                return _unknown(".".join(part for part in parts if part), sources, parser)
    for complaint in complaints:
        if match := NO_ATTRIBUTE.search(complaint.text):
            return _no_attribute(complaint.key, match["module"], match["name"], sources)
    types = [m["type"] for c in complaints if (m := WRONG_TYPE_OF_UNION.search(c.text))]
    for complaint in complaints:
        if match := WRONG_TYPE.search(complaint.text):
            if choice := LITERAL.search(match["type"]):
                return _no_choice(complaint.key, match["value"], choice["options"], sources)
            return f"{_at(complaint.key, sources)}: {match['value']} is not {_a_type(match['type'])}"
        if match := UNKNOWN_CLASS.search(complaint.text):
            if types and "." not in match["name"]:
                return f"{_at(complaint.key, sources)}: {match['name']} is not {' or '.join(map(_a_type, types))}"
            return _unknown_class(complaint.key, match["name"], sources)
    for complaint in complaints:
        set_here = sources.where(complaint.key)
        if (match := LITERAL_OF_UNION.search(complaint.text)) and set_here is not None and set_here.value:
            return _no_choice(complaint.key, set_here.value, match["options"], sources)
    place = sources.where(complaints[0].key) if complaints else None
    if types and place is not None and place.value:
        return f"{_at(place.key, sources, place)}: {place.value} is not {' or '.join(map(_a_type, types))}"
    if not complaints:
        match = NO_STAGE.search(message)
        return _no_stage(match["key"], sources) if match else message
    key = complaints[0].key
    said = dict.fromkeys(c.text for c in complaints if c.key == key)
    classes = [match[1] for text in said if (match := BROKEN_CLASS.match(text))]
    what = "; ".join(text for text in said if not BROKEN_CLASS.match(text)) or "; ".join(said)
    if not key:
        return what
    if classes:
        return f"{_at(f'{key}.class_path', sources)}: {classes[0]}: {what}"
    return f"{_at(f'{key}.class_path' if 'Import path' in what else key, sources)}: {what}"


def _no_choice(key: str, value: str, options: str, sources: ConfigSources) -> str:
    known = [str(option) for option in ast.literal_eval(f"[{options}]")]
    return f"{_at(key, sources)}: {value} is not one of the choices; {_nearest(value, known)}"


def located(error: UserError, sources: ConfigSources) -> UserError:
    """A constructor's `key=value: ...`, headed by the file and line that set the key."""
    match = re.match(r"([a-z_][\w.]*)=", str(error))
    place = sources.where(match[1]) if match else None
    return UserError(f"{place}: {error}") if place else error


def _complaints(message: str) -> list[Complaint]:
    """The leaves of the message's tree, each with the keys on the way to it."""
    found: list[Complaint] = []
    path: list[tuple[int, str]] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if not text:
            continue
        indent = len(line) - len(line.lstrip(" -"))
        while path and indent <= path[-1][0]:
            path.pop()
        if match := re.fullmatch(r"""Parser key ["'](?P<key>[^"']+)["']:(?P<rest>.*)""", text):
            path.append((indent, match["key"]))
            text = match["rest"].strip()
        if text and not BOILERPLATE.match(text):
            found.append(Complaint(".".join(key for _, key in path), text))
    return found


def _unknown(key: str, sources: ConfigSources, parser: Any) -> str:
    parts = short_key(key).split(".")
    for depth in range(len(parts)):  # the first part that is not an option is the culprit, not the leaf below it
        parent, name = ".".join(parts[:depth]), parts[depth]
        place = sources.where(".".join(parts[: depth + 1])) or sources.where(key)
        valid = valid_children(parent, place, sources, parser)
        if valid and name not in valid:
            owner = class_of(parent, place, sources)
            whose = f"an option of {owner}" if owner else (f"an option of {parent}" if parent else "a section")
            beside = get_close_matches(name, ("init_args", "class_path"), n=1, cutoff=0.75)
            beside = beside if owner and name not in beside else []
            near = f"did you mean {beside[0]}?" if beside else _meant(name, parent, valid, place, sources, parser)
            return f"{_at(place.key if place else key, sources, place)} is not {whose}; {near}"
    return f"{_at(key, sources)} is not an option"


def _meant(name: str, parent: str, valid: set[str], place: Place | None, sources: ConfigSources, parser: Any) -> str:
    """What somebody wants who writes `name` below `parent`: TRL's word, an option of a section of it, a near name."""
    if name in OURS:
        return f"TRL's {name} is {OURS[name]} here (docs/from_trl.md)"
    sections = sorted(valid) if not get_close_matches(name, valid, n=1, cutoff=0.8) else []
    owners = [f"{parent}.{section}".lstrip(".") for section in sections]
    owners = [owner for owner in owners if name in valid_children(owner, place, sources, parser)]
    return f"did you mean {' or '.join(f'{owner}.{name}' for owner in owners)}?" if owners else _nearest(name, valid)


def _no_attribute(key: str, module: str, name: str, sources: ConfigSources) -> str:
    near = get_close_matches(name, dir(import_module(module)), n=1)
    hint = f"; did you mean {module}.{near[0]}?" if near else ""
    return f"{_at(f'{key}.class_path', sources)}: there is no {name} in {module}{hint}"


def _no_stage(key: str, sources: ConfigSources) -> str:
    """An option of a stage, read before anything has said which stage."""
    if any(place.file and place.key == "model" for place in sources.places):
        return f"--model.{key} stands before the --config that names the stage: put --config first, options behind it"
    return (
        f"--model.{key} is given, but no stage that it could be an option of: give --config FILE (configs/ has one for "
        "each), or --model SFTModule, before it"
    )


def _unknown_class(key: str, name: str, sources: ConfigSources) -> str:
    if name == "None":  # the command line reads null, and then looks for a class of that name
        return (
            f"{_at(key, sources)}: a section cannot be set to null on the command line; give a YAML file with "
            f"{key.rpartition('.')[2]}: null in this place as a further --config"
        )
    if name in known_classes():
        kind = known_classes()[name].__mro__[1].__name__
        wrapped = f"; write {{reward: {{class_path: {name}}}}}" if kind == "RewardFn" else ""
        return f"{_at(f'{key}.class_path', sources)}: {name} is a {kind}, which does not fit here{wrapped}"
    if key == "model" and ("/" in name or Path(name).is_dir()):
        return f"{_at(key, sources)}: {name} is no stage; where the weights are is said by --model.policy.path {name}"
    bases = wanted_bases(short_key(key), sources)
    elsewhere = in_other_packages(name, bases)
    near = f"did you mean {elsewhere}?" if elsewhere else _nearest(name, known_classes(bases) or known_classes(), 12)
    return (
        f"{_at(f'{key}.class_path', sources)}: {name} is not a known class; {near} "
        "(your own needs its module: package.module.Class)"
    )


def _nearest(name: str, valid: Iterable[str], most: int = 60) -> str:
    valid = sorted(valid)
    begun = [option for option in valid if len(name) > 2 and option.startswith(name)]  # somebody abbreviates
    near = begun[:1] if len(begun) == 1 else get_close_matches(name, begun or valid, n=1, cutoff=0.3 if begun else 0.5)
    if near:
        return f"did you mean {near[0]}?"
    if len(valid) > most:
        valid = [*get_close_matches(name, valid, n=most, cutoff=0.0), "..."]
    return f"choose one of {', '.join(valid)}"


def _a_type(text: str) -> str:
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    plain = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list"}
    return plain.get(name, f"of type {name}")


def _at(key: str, sources: ConfigSources, place: Place | None = None) -> str:
    place = place or sources.where(key) or sources.where(key.removesuffix(".class_path"))
    return f"{place}: {place.key if place.file else '--' + place.key}" if place else key
