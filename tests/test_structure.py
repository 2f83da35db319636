"""Imports go one way: each folder of the package may import only those below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opensala"
BELOW = {
    "ops": set(),
    "cache": set(),
    "model": {"ops", "cache"},
    "data": set(),
    "runs": set(),
    "hub": {"runs"},
    "parallel": {"model"},
    "convert": {"ops", "model", "parallel", "data", "runs", "hub"},
    "train": {"ops", "model", "parallel", "data", "runs", "hub", "convert"},
    "engine": {"ops", "cache", "model", "data", "hub"},
    "contexts": {"ops", "cache", "model", "data", "runs", "engine"},
    "server": {"engine", "contexts"},
    "quantize": {"ops", "model", "data", "runs", "hub", "engine"},
    "evaluate": {"ops", "model", "data", "runs", "engine"},
    "bench": {
        "ops",
        "model",
        "data",
        "runs",
        "hub",
        "convert",
        "train",
        "engine",
        "server",
        "quantize",
        "evaluate",
    },
}
BELOW["cli"] = {*BELOW, "__version__"}


def imported(file):
    """Names directly below `opensala` that a file imports, wherever in the file the import stands."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else (node.module or "").split(".")
            module = base + (node.module.split(".") if node.module else []) if node.level else base
            if node.level or module[0] == "opensala":
                path = module if node.level else module[1:]
                yield from [path[0]] if path else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("opensala."))


@pytest.mark.parametrize(
    "folder", sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("**/*.py")))
)
def test_folder_imports_only_what_is_below(folder):
    assert folder in BELOW, f"{folder}: say in this test what it may import"
    for file in (PACKAGE / folder).rglob("*.py"):
        for name in imported(file):
            assert name == folder or name in BELOW[folder], f"{file.name} imports {name}"


def test_nothing_imports_the_command_line():
    for file in PACKAGE.rglob("*.py"):
        own = file == PACKAGE / "__main__.py" or PACKAGE / "cli" in file.parents
        assert own or "cli" not in set(imported(file)), file


def test_files_and_folders_are_documented():
    for file in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} needs a module docstring"
