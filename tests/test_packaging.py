"""What is declared, what is installed, what importing costs."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
DEPENDENCIES = {r.name: r for r in map(Requirement, PROJECT["project"]["dependencies"])}
PINS = dict(re.findall(r"^([\w-]+)==(\S+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))


# --- versions


def test_malicious_uploads_of_lightning_are_excluded():
    allowed = DEPENDENCIES["lightning"].specifier
    assert not any(bad in allowed for bad in ("2.6.2", "2.6.3", "3.0.0"))
    assert all(good in allowed for good in ("2.6.4", "2.6.6", "2.9.0"))


@pytest.mark.parametrize(
    ("name", "floor", "below"),
    [
        ("torch", "2.11.0", "2.10.0"),
        ("transformers", "5.17.0", "5.16.0"),
        ("jsonargparse", "4.53.0", "4.52.0"),
        ("torchmetrics", "1.6.0", "1.5.0"),
        ("triton", "3.6.0", "3.5.0"),
        ("pydantic", "2.0.0", "1.10.0"),
    ],
)
def test_floors(name, floor, below):
    assert floor in DEPENDENCIES[name].specifier
    assert below not in DEPENDENCIES[name].specifier


def test_the_next_major_version_of_jsonargparse_is_not_taken_on_trust():
    assert "5.0.0" not in DEPENDENCIES["jsonargparse"].specifier
    assert "signatures" in DEPENDENCIES["jsonargparse"].extras


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_what_is_installed_is_allowed(name):
    requirement = DEPENDENCIES[name]
    if requirement.marker is not None and not requirement.marker.evaluate():
        pytest.skip(f"{name} is not for this platform: {requirement.marker}")
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")  # triton has no build for torch without CUDA in some places
    assert requirement.specifier.contains(installed, prereleases=True)


def test_the_tested_set_is_allowed():
    pinned = [name for name in DEPENDENCIES if name in PINS]
    assert {"torch", "lightning", "transformers", "jsonargparse"} <= set(pinned)
    assert PINS["torch"] == "2.13.0"
    assert all(Version(PINS[name]) in DEPENDENCIES[name].specifier for name in pinned)


def test_extras_python_and_licence():
    project = PROJECT["project"]
    assert {"flash", "quant", "verifiers", "vllm", "peers", "dev"} == set(project["optional-dependencies"])
    assert "3.11" in Requirement(f"python{project['requires-python']}").specifier
    assert project["license"] == "Apache-2.0"
    licence = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


# --- what importing costs


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_neither_torch_nor_lightning():
    heavy = "{'torch', 'lightning', 'transformers', 'datasets', 'numpy', 'jsonargparse', 'rlhf_kernels'}"
    assert run(f"import sys, rlhf_lightning; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_the_overview_and_the_version_import_nothing_heavy():
    code = "import sys; from rlhf_lightning.__main__ import main; main(['{}']); assert 'torch' not in sys.modules"
    assert "SUBCOMMAND" in run(code.format("--help"))
    assert run(code.format("--version")).startswith("rlhf-lightning ")


def test_every_lazy_name_resolves():
    import rlhf_lightning

    assert set(rlhf_lightning.__all__) <= set(dir(rlhf_lightning))
    assert all(getattr(rlhf_lightning, name) is not None for name in rlhf_lightning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'SFTModul'"):
        _ = rlhf_lightning.SFTModul


def test_the_kernels_need_no_trainer():
    foreign = "{'lightning', 'transformers', 'rlhf_lightning'}"
    assert run(f"import sys, rlhf_kernels; print(sorted({foreign} & set(sys.modules)))").strip() == "[]"


def cpu_seconds(*arguments: str) -> float:
    """User and system time of a Python process: other processes on the machine do not count."""
    before = os.times()
    command = [sys.executable, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_of_fit_costs_little_more_than_importing_lightning():
    def share() -> float:
        return cpu_seconds("-m", "rlhf_lightning", "fit", "--help") / cpu_seconds("-c", "import lightning")

    assert any(share() < 1.6 for _ in range(4))  # in turn with Lightning: a busy machine slows both


def test_who_names_no_adapter_does_not_import_peft():
    """It brings bitsandbytes with it."""
    code = "import sys; from rlhf_lightning.__main__ import main; main(['fit', '--help']); print(); print({})"
    said = run(code.format("sorted({'peft', 'bitsandbytes'} & set(sys.modules))"))
    assert said.splitlines()[-1] == "[]"


# --- the wheel


def test_both_packages_are_named_and_typed():
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == ["rlhf_lightning", "kernels/rlhf_kernels"]
    assert all((REPOSITORY / package / "__init__.py").is_file() for package in packages)
    assert all((REPOSITORY / package / "py.typed").is_file() for package in packages)
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()  # a top-level `kernels` would shadow another package
    [(script, target)] = PROJECT["project"]["scripts"].items()
    assert (script, target) == ("rlhf-lightning", "rlhf_lightning.__main__:main")


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not installed: the wheel is not built here")
def test_the_wheel_holds_both_packages(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("rlhf_lightning", "kernels/rlhf_kernels"):
        root = (REPOSITORY / package).parent
        files = [path for path in (REPOSITORY / package).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert {path.relative_to(root).as_posix() for path in files} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)
