"""pyproject.toml, the pinned set and the conda environment name the same packages."""

import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("dev", "tensorboard")  # what scripts/setup_env.sh and environment.yaml install
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def parse(lines):
    """Requirements of a requirements file or of a list in pyproject.toml."""
    lines = [line.split("#")[0].strip() for line in lines]
    return [Requirement(line) for line in lines if line]


def pins(python):
    """{package: version} of the pinned set on one version of Python."""
    lines = (ROOT / "requirements.lock.txt").read_text().splitlines()
    found = {}
    for pin in parse(lines):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert canonicalize_name(pin.name) not in found
            found[canonicalize_name(pin.name)] = specifier.version
    return found


def ranges():
    """{package: range} of the project with the extras that are installed by default."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in EXTRAS for line in extras[extra]]
    return {canonicalize_name(each.name): each.specifier for each in parse(lines)}


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pinned_set_holds_the_project_and_satisfies_its_ranges(python):
    pinned = pins(python)
    # torchvision is open-clip-torch's; it stands there because it has to match torch.
    assert pinned.keys() == ranges().keys() | {"torchvision"}
    for name, specifier in ranges().items():
        assert specifier.contains(pinned[name]), name


def test_conda_installs_the_same_through_pip():
    dependencies = yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"]
    python, pip, through_pip = dependencies
    assert python.removeprefix("python=") in PYTHONS and pip == "pip"
    assert through_pip["pip"] == ["-r requirements.lock.txt", f"-e .[{','.join(EXTRAS)}]"]
    assert f'-r requirements.lock.txt -e ".[{",".join(EXTRAS)}]"' in (
        (ROOT / "scripts" / "setup_env.sh").read_text()
    )


def test_this_environment_is_one_the_project_allows():
    from importlib.metadata import version

    for name, specifier in ranges().items():
        assert specifier.contains(version(name), prereleases=True), name
