"""Versions with known holes are neither declared nor installed."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
DECLARED = {r.name.lower(): r for r in map(Requirement, PROJECT["dependencies"])}

KNOWN = [
    ("torch", "2.10.0", "CVE-2025-32434, CVE-2026-24747: weights_only runs code, or breaks memory"),
    ("transformers", "5.3.0", "CVE-2024-3568, CVE-2026-1839, CVE-2026-4372: loading a model runs code"),
    ("lightning", "2.6.4", "GHSA-w37p-236h-pfx3: malicious uploads 2.6.2 and 2.6.3"),
    ("datasets", "4.0.0", "data sets with scripts"),
    ("pyarrow", "14.0.1", "CVE-2023-47248: reading a Parquet file runs code"),
    ("jinja2", "3.1.6", "CVE-2025-27516: chat templates leave their sandbox"),
    ("jsonargparse", "4.53.0", "no list of modules that a config may name"),
    ("pyyaml", "5.4", "CVE-2020-14343: full_load runs code"),
]


@pytest.mark.parametrize(("name", "first_safe", "why"), KNOWN, ids=[name for name, _, _ in KNOWN])
def test_no_version_with_a_known_hole(name, first_safe, why):
    if name in DECLARED:
        assert _just_below(first_safe) not in DECLARED[name].specifier, why
    try:
        installed = Version(version(name))
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    assert installed >= Version(first_safe), f"{name} {installed}: {why}"


def _just_below(wanted: str) -> str:
    release = [*Version(wanted).release, 0, 0][:3]
    last = max(index for index, part in enumerate(release) if part)
    release[last] -= 1
    return ".".join(map(str, release[: last + 1] + [999] * (2 - last)))


def test_what_is_below_is_what_it_says():
    assert _just_below("2.10.0") == "2.9.999"
    assert _just_below("3.1.6") == "3.1.5"
    assert _just_below("4.0.0") == "3.999.999"


def test_malicious_uploads_are_excluded_by_name():
    assert not {"2.6.2", "2.6.3"} & {v for v in ("2.6.2", "2.6.3", "2.6.4") if v in DECLARED["lightning"].specifier}
