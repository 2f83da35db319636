"""What a fresh machine installs: every declared dependency pinned with hashes, inside its declared range."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = sorted(ROOT.glob("requirements*.lock"))
PYTHONS = ("3.11.7", "3.12.1", "3.13.0")


def declared(*extras):
    """The direct dependencies of the package with `extras`, each once."""
    return list(dict.fromkeys(map(Requirement, PROJECT["project"]["dependencies"] + texts_of(*extras))))


def texts_of(*extras):
    """The entries of `extras`, those of an extra that another one names (`opensala[train]`) in its place."""
    found = []
    for text in (t for extra in extras for t in PROJECT["project"]["optional-dependencies"][extra]):
        requirement = Requirement(text)
        found += texts_of(*requirement.extras) if requirement.name == "opensala" else [text]
    return found


def pins(lock):
    """(requirement, number of hashes) for each entry of a lock file; anything else in it is an error."""
    text = (ROOT / lock).read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        requirement, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
        assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes), line
        found.append((Requirement(requirement), len(hashes)))
    return found


def version(lock, name, python):
    """The version of `name` that `lock` installs on Linux with this Python."""
    environment = {"python_full_version": python, "python_version": python[:4], "sys_platform": "linux"}
    versions = [
        str(pin.specifier).removeprefix("==")
        for pin, _ in pins(lock)
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]
    assert len(versions) == 1, f"{lock} has {versions} of {name} for Python {python}"
    return Version(versions[0])


def direct(*extras):
    """Dependencies that a lock has to pin: all but torch, which is installed on its own."""
    return sorted((r for r in declared(*extras) if r.name != "torch"), key=str)


def lower_bound(requirement):
    return next(Version(s.version) for s in requirement.specifier if s.operator in (">=", "=="))


def test_there_is_a_lock_for_each_environment():
    assert [lock.name for lock in LOCKS] == [
        "requirements-build.lock",
        "requirements-oldest.lock",
        "requirements.lock",
    ]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_entry_is_one_version_with_hashes(lock):
    """Only entries `name==version; marker --hash=...`: an index, a link or a path would not parse."""
    for pin, hashes in pins(lock.name):
        assert [s.operator for s in pin.specifier] == ["=="] and pin.url is None, pin
        assert hashes, f"{pin} has no hash"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_no_lock_brings_a_torch_or_a_cuda_library(lock):
    assert [pin.name for pin, _ in pins(lock.name) if re.match(r"torch$|nvidia-|cuda-", pin.name)] == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("requirement", direct("dev"), ids=str)
def test_the_lock_has_every_dependency_in_its_range(requirement, python):
    assert version("requirements.lock", requirement.name, python) in requirement.specifier


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("requirement", direct("test"), ids=str)
def test_the_oldest_lock_has_the_lower_bounds(requirement, python):
    found = version("requirements-oldest.lock", requirement.name, python)
    assert found == lower_bound(requirement), f"{requirement}: nothing tests a version below {found}"


def test_the_build_lock_has_every_build_tool():
    for text in PROJECT["dependency-groups"]["build"]:
        requirement = Requirement(text)
        assert version("requirements-build.lock", requirement.name, "3.11.7") in requirement.specifier
    assert set(PROJECT["build-system"]["requires"]) <= set(PROJECT["dependency-groups"]["build"])


def test_each_dependency_has_an_upper_bound():
    """A version that no test has seen is let in by a commit here, not by a release there."""
    open_ended = [str(r) for r in declared("dev") if not any(s.operator in ("<", "==") for s in r.specifier)]
    assert open_ended == []


def test_one_torch_in_makefile_metadata_and_range():
    """The version make installs is the one whose dependencies are locked, and within the declared range."""
    installed = re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M).group(1)
    described = next(m for m in PROJECT["tool"]["uv"]["dependency-metadata"] if m["name"] == "torch")
    torch = next(r for r in declared() if r.name == "torch")
    assert installed == described["version"] and installed in torch.specifier


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_what_torch_asks_for(python):
    described = next(m for m in PROJECT["tool"]["uv"]["dependency-metadata"] if m["name"] == "torch")
    for requirement in map(Requirement, described["requires-dist"]):
        assert version("requirements.lock", requirement.name, python) in requirement.specifier
