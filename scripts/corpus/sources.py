"""The sources of the corpus: which packages, how their text is read, and how much of it is taken.

`docs/corpus.md` lists versions and licences. Documents are (title, text) pairs.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import extract
from clean import clean, split, words

Documents = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """Documents of some packages, `characters` of them at most, drawn as whole documents."""

    group: str
    packages: tuple[str, ...]
    characters: float
    read: Callable[[Path], Documents]


def pages(
    pattern: str,
    merge: int = 24_000,
    reader: Callable[[Path], str] = extract.from_html,
    exclude: str = "",
) -> Callable[[Path], Documents]:
    """Files of a pattern in order, short ones of a folder one behind the other up to `merge` characters."""

    def documents(root: Path) -> Documents:
        title, folder, held = "", None, []
        for file in sorted(p for p in root.glob(pattern) if p.is_file()):
            text = "" if exclude and re.search(exclude, str(file)) else clean(reader(file))
            if len(text) < 300:
                continue
            if held and (file.parent != folder or sum(map(len, held)) > merge):
                yield title, "\n\n".join(held)
                held = []
            title, folder = (title if held else file.name), file.parent
            held.append(text)
        if held:
            yield title, "\n\n".join(held)

    return documents


def chained(*readers: Callable[[Path], Documents]) -> Callable[[Path], Documents]:
    def documents(root: Path) -> Documents:
        for reader in readers:
            yield from reader(root)

    return documents


def merged(documents: Documents, to: int = 24_000) -> Documents:
    title, held = "", []
    for name, text in documents:
        title = title if held else name
        held.append(text)
        if sum(map(len, held)) > to:
            yield title, "\n\n".join(held)
            held = []
    if held:
        yield title, "\n\n".join(held)


def html(package: str, pattern: str = "**/*.html", **options: object) -> Callable[[Path], Documents]:
    return pages(f"{package}/{pattern}", **options)  # type: ignore[arg-type]


def info(*packages: str) -> Callable[[Path], Documents]:
    return chained(*(pages(f"{p}/**/*.info*.gz", 0, extract.from_info) for p in packages))


def xml(path: Path) -> str:
    return extract.from_html(path, xml=True)


def novels(root: Path) -> Documents:
    file = root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for lines in extract.r_strings(file):
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", "\n".join(lines))]
        yield from split(lines[0].title(), "\n\n".join(p for p in paragraphs if p), 450_000)


def books(root: Path) -> Documents:
    go = "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"
    klauspost = "usr/share/gocode/src/github.com/klauspost/compress/testdata/Mark.Twain-Tom.Sawyer.txt"
    files = [
        root / "golang-1.19-src" / go,
        root / "golang-github-klauspost-compress-dev" / klauspost,
        root / "dasher-data/usr/share/dasher/training_english_GB.txt",
        *sorted(root.glob("Brotli/**/tests/testdata/*.txt")),
        *sorted((root / "miscfiles/usr/share/state").glob("*.gz")),
    ]
    for file in files:
        verse = file.name in ("asyoulik.txt", "plrabn12.txt")
        text = extract.from_plain(file)
        yield file.name, text if verse else clean(text)


def world_english_bible(root: Path) -> Documents:
    module = "sword-text-web/usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for testament, text in enumerate(extract.sword_texts(root / module)):
        for n, book in enumerate(re.split(r"<div[^>]*type=\"book\"[^>]*>", text)):
            plain = extract.squeeze(extract.without_markup(re.sub(r"\n+", " ", book)))
            if len(plain) > 2000:
                yield from split(f"World English Bible {testament}.{n}", clean(plain, strict=False), 200_000)


def commentary(package: str, module: str) -> Callable[[Path], Documents]:
    def documents(root: Path) -> Documents:
        for text in extract.sword_texts(root / package / "usr/share/sword/modules/comments/zcom" / module):
            yield from split(module, clean(extract.squeeze(extract.without_markup(text))), 200_000)

    return documents


def dictionary(package: str, name: str) -> Callable[[Path], Documents]:
    def documents(root: Path) -> Documents:
        entries = extract.dict_entries(root / package / "usr/share/dictd", name)
        texts = (
            " ".join(re.sub(r"\[[^]]*(?:Webster|WordNet|PJC)[^]]*\]|[{}]", "", e).split()) for e in entries
        )
        yield from merged(((name, t) for t in texts if len(t) >= 150 and clean(t)), 30_000)

    return documents


def fortunes(root: Path) -> Documents:
    for file in sorted((root / "fortunes/usr/share/games/fortunes").rglob("*")):
        if file.is_file() and file.suffix == "" and file.name != "songs-poems":
            items = (i.strip() for i in extract.read(file).split("\n%\n"))
            shown = (re.sub(r"\s*\n\s*", " ", i) if len(i) > 120 else i for i in items)
            yield from split(file.name, "\n\n".join(i for i in shown if len(i) > 60), 30_000)


def _texts_in(value: object, key: str = "") -> Iterable[str]:
    """Descriptions, dialogues and messages in the game's JSON."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from () if name in ("//", "comment") else _texts_in(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner, key)
    elif isinstance(value, str) and len(value) > 60 and key in _TEXT_KEYS:
        yield value


_TEXT_KEYS = words(
    "text description str dynamic_line desc yes no offer accept complete descriptions messages "
    "snippets message sound"
)


def cataclysm(root: Path) -> Documents:
    def files() -> Documents:
        for file in sorted((root / "cataclysm-dda-data").rglob("*.json")):
            texts = _texts_in(json.loads(file.read_text()))
            text = clean("\n\n".join(re.sub(r"</?\w+>", "", t).replace("\\n", "\n") for t in texts))
            if len(text) > 1500:
                yield from split(file.name, text, 200_000)

    yield from merged(files())


def endless_sky(root: Path) -> Documents:
    for file in sorted((root / "endless-sky-data/usr/share/games/endless-sky/data").rglob("*.txt")):
        spoken = re.findall(r"`([^`\n]{30,})`", file.read_text())
        text = "\n\n".join(s.strip() for s in spoken).replace("<first>", "Jane").replace("<last>", "Doe")
        yield from split(file.name, clean(re.sub(r"<(\w+)>", r"\1", text), strict=False), 200_000)


def wesnoth(root: Path) -> Documents:
    def files() -> Documents:
        for file in sorted(root.glob("wesnoth*/usr/share/games/wesnoth/1.16/data/**/*.cfg")):
            found = re.findall(r'_\s*"((?:[^"]|"")*)"', extract.read(file))
            text = "\n\n".join(extract.squeeze(t.replace('""', '"')) for t in found if len(t) > 50)
            text = clean(re.sub(r"<[^>]*>", "", text), strict=False)
            if len(text) > 1200:
                yield file.name, text

    yield from merged(files())


def crawl(root: Path) -> Documents:
    folder = root / "crawl-common/usr/share/crawl/dat"
    for file in sorted(folder.rglob("*.txt")):
        if not re.search(r"/[a-z]{2}(_\w+)?/", str(file.relative_to(folder))):
            entries = (extract.squeeze(e.partition("\n")[2]) for e in extract.read(file).split("%%%%"))
            yield file.name, clean("\n\n".join(entries), strict=False)


def freeorion(root: Path) -> Documents:
    text = extract.read(root / "freeorion-data/usr/share/games/freeorion/default/stringtables/en.txt")
    found = "\n\n".join(extract.squeeze(t) for t in re.findall(r"'''(.*?)'''", text, re.S))
    yield from split("freeorion", clean(re.sub(r"<[^>]*>|\[\[|\]\]", "", found)), 60_000)


def gz(pattern: str, reader: Callable[[Path], str], exclude: str = "") -> Callable[[Path], Documents]:
    return pages(pattern, reader=reader, exclude=exclude)


CAMPAIGNS = tuple(
    f"wesnoth-1.16-{n}"
    for n in sorted(words("did dm dw ei httt l low nr sof sotbe sota thot trow tsg ttb utbs"))
)
_NOT_PAGES = "changelog|copyright"
SOURCES = (
    Source("literature", ("r-cran-janeaustenr",), 9e6, novels),
    Source(
        "literature",
        (
            "golang-1.19-src",
            "golang-github-klauspost-compress-dev",
            "dasher-data",
            "miscfiles",
            "pypi:Brotli",
        ),
        9e6,
        books,
    ),
    Source("religion", ("sword-text-web",), 2.6e6, world_english_bible),
    Source("religion", ("sword-comm-tdavid",), 3.2e6, commentary("sword-comm-tdavid", "tdavid")),
    Source("religion", ("sword-comm-mhcc",), 1.6e6, commentary("sword-comm-mhcc", "mhcc")),
    Source("essays", ("anarchism",), 3.6e6, html("anarchism", merge=0)),
    Source("essays", ("dict-jargon",), 1e6, dictionary("dict-jargon", "jargon")),
    Source("essays", ("dict-foldoc",), 1.3e6, dictionary("dict-foldoc", "foldoc")),
    Source("essays", ("dict-devil",), 0.4e6, dictionary("dict-devil", "devil")),
    Source("essays", ("dict-gcide",), 1.2e6, dictionary("dict-gcide", "gcide")),
    Source("essays", ("fortunes",), 0.9e6, fortunes),
    Source("games", ("cataclysm-dda-data",), 3e6, cataclysm),
    Source("games", ("endless-sky-data",), 3e6, endless_sky),
    Source("games", ("wesnoth-1.16-data", *CAMPAIGNS), 3e6, wesnoth),
    Source("games", ("crawl-common",), 0.9e6, crawl),
    Source("games", ("freeorion-data",), 0.7e6, freeorion),
    Source("games", ("nethack-common",), 0.2e6, gz("nethack-common/**/Guidebook.txt.gz", extract.from_plain)),
    Source(
        "debian", ("debian-policy",), 0.9e6, html("debian-policy", merge=8000, exclude="changelog|genindex")
    ),
    Source(
        "debian",
        ("developers-reference",),
        0.5e6,
        html("developers-reference", merge=8000, exclude="/(de|fr|ja|ru|it)/"),
    ),
    Source("debian", ("debian-handbook",), 1.5e6, html("debian-handbook", "**/en-US/*.html")),
    Source("debian", ("debian-reference-en",), 0.6e6, html("debian-reference-en", merge=8000)),
    Source("debian", ("debian-faq",), 0.3e6, html("debian-faq", exclude=r"\.(\w\w|\w\w-\w\w)\.html")),
    Source(
        "debian",
        ("debian-history",),
        0.3e6,
        html("debian-history", exclude=r"\.(?!en\b)(\w\w|\w\w-\w\w)\.html"),
    ),
    Source(
        "debian", ("installation-guide-amd64",), 0.6e6, html("installation-guide-amd64", "**/en/**/*.html")
    ),
    Source("debian", ("harden-doc",), 0.6e6, html("harden-doc", "**/en-US/*.html")),
    Source("debian", ("debian-edu-doc-en",), 0.4e6, html("debian-edu-doc-en", merge=8000)),
    Source("debian", ("freedombox-doc-en",), 0.4e6, html("freedombox-doc-en", "**/*.part.html")),
    Source("debian", ("maint-guide",), 0.3e6, html("maint-guide", "**/*.en.html")),
    Source("debian", ("user-mode-linux-doc",), 0.2e6, html("user-mode-linux-doc")),
    Source(
        "python",
        ("python3.11-doc",),
        2.6e6,
        html("python3.11-doc", merge=12000, exclude="genindex|/whatsnew/changelog|search|contents"),
    ),
    Source(
        "python",
        ("python-django-doc",),
        1.6e6,
        html("python-django-doc", merge=12000, exclude="genindex|/releases/"),
    ),
    Source(
        "python",
        ("python-sqlalchemy-doc",),
        0.8e6,
        html("python-sqlalchemy-doc", merge=12000, exclude="genindex|changelog"),
    ),
    Source(
        "python",
        ("python-flask-doc", "python-werkzeug-doc"),
        0.6e6,
        pages("python-[fw]*-doc/**/*.html", exclude="genindex|changes"),
    ),
    Source("python", ("docutils-doc",), 0.5e6, html("docutils-doc", exclude="HISTORY|RELEASE")),
    Source(
        "systems",
        ("postgresql-doc-15",),
        2.4e6,
        html("postgresql-doc-15", exclude="release-|bookindex|legal"),
    ),
    Source(
        "systems",
        ("sqlite3-doc",),
        1.6e6,
        html("sqlite3-doc", exclude="releaselog|changes|syntax/|c3ref/|session/|matrix|requirements|doc_"),
    ),
    Source(
        "systems",
        ("linux-doc-6.1",),
        2.8e6,
        html("linux-doc-6.1", exclude="genindex|/translations/|/changelog"),
    ),
    Source(
        "systems",
        ("apache2-doc",),
        0.9e6,
        html("apache2-doc", "**/en/**/*.html", exclude="/license|/mod/quickref|directives|/style"),
    ),
    Source("systems", ("git-doc",), 1.1e6, html("git-doc", exclude="RelNotes")),
    Source("systems", ("perl-doc",), 1.6e6, gz("perl-doc/**/*.pod", extract.from_pod, "delta")),
    Source(
        "systems",
        ("bash-doc", "autoconf-doc", "zsh-doc", "automake", "binutils-doc", "gnuplot-doc"),
        1.6e6,
        info("bash-doc", "autoconf-doc", "zsh-doc", "automake", "binutils-doc", "gnuplot-doc"),
    ),
    Source(
        "systems",
        ("octave-doc", "maxima-doc", "r-doc-info"),
        1.2e6,
        info("octave-doc", "maxima-doc", "r-doc-info"),
    ),
    Source("systems", ("manpages",), 0.5e6, gz("manpages/**/*.gz", extract.from_man, _NOT_PAGES)),
    Source(
        "systems", ("freebsd-manpages",), 0.5e6, gz("freebsd-manpages/**/*.gz", extract.from_man, _NOT_PAGES)
    ),
    Source("systems", ("rust-doc",), 1.6e6, pages("rust-doc/**/html/[brn]*/*.html", exclude="print.html")),
    Source("systems", ("cmake-doc",), 0.4e6, html("cmake-doc", "**/manual/*.html")),
    Source(
        "systems",
        ("postfix-doc", "mutt", "exim4-doc-html", "wireshark-doc", "shorewall-doc"),
        1.3e6,
        chained(
            *(html(p) for p in ("postfix-doc", "mutt", "exim4-doc-html", "wireshark-doc", "shorewall-doc"))
        ),
    ),
    Source(
        "systems",
        ("c++-annotations-txt",),
        0.6e6,
        gz("c++-annotations-txt/**/*.txt*", extract.from_plain),
    ),
    Source("desktop", ("gimp-help-en",), 1e6, html("gimp-help-en")),
    Source("desktop", ("gnome-user-docs",), 1.2e6, pages("gnome-user-docs/**/C/**/*.page", reader=xml)),
    Source("desktop", ("libreoffice-help-en-us",), 0.8e6, html("libreoffice-help-en-us")),
    Source(
        "desktop",
        ("lilypond-doc-html",),
        1.2e6,
        html("lilypond-doc-html", exclude=r"\.\w\w\.html|/snippets|/internals|/changes"),
    ),
    Source("desktop", ("gnumeric-doc",), 0.6e6, pages("gnumeric-doc/**/C/**/*.xml", reader=xml)),
)
