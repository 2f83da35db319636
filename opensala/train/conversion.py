"""The stage of a recipe that converts the Transformer: HALO, on texts of the run."""

from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from ..convert import convert
from ..convert.config import ConvertConfig
from ..data.documents import installed_texts
from ..data.pack import PackSource, is_packed, pack, parse_sources
from ..hub import checkpoint_folder
from ..parallel import ParallelMesh, from_first
from ..runs.progress import counter
from .recipe import Halo, Recipe, Stage


def run_halo(
    recipe: Recipe,
    stage: Halo,
    teacher: str,
    path: Path,
    mesh: ParallelMesh,
    *,
    device: str | None,
    skip_bad: bool,
    quiet: bool,
) -> None:
    """Convert `teacher` in `path`/halo; goes on if that was begun.

    Its texts are its own (`stage.config.data`), or the files of the first stage that trains the hybrid on
    text, or those of this Python installation.
    """
    config = replace(stage.config, teacher=teacher, seed=recipe.seed)
    if device is not None:
        config = replace(config, device=device)
    if not config.sparse_config:
        config = replace(config, sparse_config=dict(recipe.model.get("sparse_config", {})))
    texts = path / "halo_texts"
    data = from_first(
        mesh,
        lambda: str(
            packed_texts(recipe, config, texts, skip_bad=skip_bad, quiet=quiet) or _installed(path / "texts")
        ),
    )
    config = replace(config, data=(data,))
    begun = (path / "halo" / "config.json").exists()
    convert(config, path / "halo", resume=begun, quiet=quiet)


def packed_texts(
    recipe: Recipe, config: ConvertConfig, folder: Path, *, skip_bad: bool, quiet: bool
) -> Path | None:
    """The conversion's texts as packed tokens in `folder`, as many as it trains on: its own, or the recipe's
    files in their shares. None where there are no files."""
    if len(config.data) == 1 and is_packed(config.data[0]):
        return Path(config.data[0])
    sources = parse_sources(config.data) if config.data else recipe_files(recipe)
    if not sources:
        return None
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(config.teacher))
    wanted = sum(p.steps * p.batch * config.length_of(name) for name, p in config.phases().items())
    with counter("tokens of the conversion", quiet) as advance:
        made = pack(
            sources,
            tokenizer,
            folder,
            tokens=max(1, wanted),
            seed=recipe.seed,
            skip_bad=skip_bad,
            advance=advance,
        )
    return made.folder


def recipe_files(recipe: Recipe) -> list[PackSource]:
    """The files of the first stage that trains the hybrid on text."""
    for stage in recipe.stages:
        if isinstance(stage, Stage) and not stage.dense_start and not stage.chat:
            made = ("python:", "synthetic:")
            given = [s for s in stage.mixture if s.path and not s.path.startswith(made)]
            return [PackSource(s.name, s.path, s.weight) for s in given]
    return []


def _installed(folder: Path) -> Path:
    """Texts of the installation as files, for the conversion."""
    folder.mkdir(exist_ok=True)
    for kind in ("code", "prose"):
        file = folder / f"{kind}.txt"
        if not file.exists():
            file.with_suffix(".partial").write_text("\n\n".join(installed_texts(kind)), encoding="utf-8")
            file.with_suffix(".partial").replace(file)
    return folder
