"""Running text out of the files that packages carry: HTML, info, man, pod, dictd, SWORD, R and game data.

Each reader takes a path and gives paragraphs separated by empty lines; what is prose is decided elsewhere.
"""

import bz2
import gzip
import html
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

from clean import words

BLOCKS = words(
    "p div li dt dd h1 h2 h3 h4 h5 h6 section title blockquote article item note para desc steps list "
    "ul ol dl tr main center body info"
)
DROPPED = words(
    "script style nav header footer table head aside svg form button select pre screen programlisting "
    "figure media math comment credit license links"
)
DROPPED_CLASS = re.compile(
    r"sphinxsidebar|\brelated\b|navheader|navfooter|\btoc\b|headerlink|\bfooter|\bnavigation|(?<!with)sidebar|"
    r"toctree|highlight|programlisting|screen|index|menu|copyright|legalnotice|navi|topnav|crumb|viewcode|"
    r"admonition-todo|versionmodified|bottom|mobile|langs",
    re.I,
)
MAY_BE_DROPPED = words("div ul a span p table ol dl")
VOID = words("br hr img input link meta area base col embed source track wbr include xi:include")
_BASE64 = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


class TextParser(HTMLParser):
    """Collects text outside the dropped elements."""

    def __init__(self, xml: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = 0
        self.open: list[tuple[str, bool]] = []
        self.xml = xml

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            if tag == "br" and not self.skipping:
                self.parts.append("\n")
            return
        given = dict(attrs)
        names = f"{given.get('class') or ''} {given.get('id') or '' if tag in ('div', 'nav', 'ul') else ''}"
        dropped = tag in DROPPED or (tag in MAY_BE_DROPPED and bool(DROPPED_CLASS.search(names)))
        dropped = dropped and not (self.xml and tag == "title")
        self.open.append((tag, dropped))
        self.skipping += dropped
        if tag in BLOCKS and not self.skipping:
            self.parts.append("\n\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br" and not self.skipping:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        tags = [name for name, _ in self.open]
        if tag in VOID or tag not in tags:
            return
        place = len(tags) - 1 - tags[::-1].index(tag)
        self.skipping -= sum(dropped for _, dropped in self.open[place:])
        del self.open[place:]
        if tag in BLOCKS and not self.skipping:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def read(path: Path) -> str:
    """A text file, compressed or not."""
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    if path.suffix == ".bz2":
        raw = bz2.decompress(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def squeeze(text: str) -> str:
    """Paragraphs as one line each."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def from_html(path: Path, xml: bool = False) -> str:
    parser = TextParser(xml)
    parser.feed(read(path))
    parser.close()
    return squeeze("".join(parser.parts).replace("\u00b6", ""))


def from_info(path: Path) -> str:
    """Nodes without their headers and menus; blocks indented by five or more are examples."""
    kept = []
    for node in read(path).split("\x1f")[1:]:
        if node.lstrip().startswith(("Tag Table", "Indirect", "End Tag")):
            continue
        body = re.split(r"\n\* Menu:", node.split("\n", 2)[-1])[0]
        kept.append("\n".join(x for x in body.split("\n") if not re.fullmatch(r"[*=\-.~]{3,}", x.strip())))
    parts = re.split(r"\n\s*\n", "\n\n".join(kept))
    return squeeze(
        "\n\n".join(p for p in parts if not all(x.startswith("     ") for x in p.split("\n") if x.strip()))
    )


def from_plain(path: Path) -> str:
    """Hard-wrapped prose as one line per paragraph; verse, whose lines are short, keeps its lines."""
    kept = []
    for part in re.split(r"\n\s*\n", read(path).replace("\r", "")):
        lines = part.split("\n")
        lengths = [len(line) for line in lines[:-1]]
        prose = not lengths or sum(lengths) / len(lengths) > 50
        kept.append(" ".join(part.split()) if prose else "\n".join(line.strip() for line in lines))
    return "\n\n".join(part for part in kept if part.strip())


def from_pod(path: Path) -> str:
    kept, reading = [], True
    for part in re.split(r"\n\s*\n", read(path)):
        if part.startswith("=cut"):
            reading = False
            continue
        if part.startswith("="):
            reading = True
            heading = re.match(r"=(?:head\d|item)\s*", part)
            part = part[heading.end() :] if heading else ""
        if not reading or part.startswith((" ", "\t")):
            continue
        for _ in range(3):  # codes within codes
            part = re.sub(r"[BCFISX]<<+ (.*?) >>+", r"\1", part)
            part = re.sub(r"L<(?:[^<>|]*\|)?([^<>]*)>", r"\1", part)
            part = re.sub(r"[BCFIS]<([^<>]*)>", r"\1", part)
        part = re.sub(r"X<[^<>]*>|Z<>", "", part)
        kept.append(part.replace("E<lt>", "<").replace("E<gt>", ">"))
    return squeeze("\n\n".join(kept))


_MAN_BREAKS = words("SH SS PP P LP TP IP Sh Ss Pp It HP sp")
_MAN_HEADINGS = words("SH SS Sh Ss")
_MAN_INLINE = words(
    "B I BR IR RB RI BI IB SM SB Nm Xr Fl Ar Pa Dq Em Sy Va Fn Ev Dv Li Cm Ql Sq Nd Fx Op Pq Cd In Vt "
    "Ft Fa Er"
)
_MAN_ESCAPES = {
    "\\-": "-",
    "\\(aq": "'",
    "\\(bu": "*",
    "\\(em": " - ",
    "\\&": "",
    "\\e": "\\",
    "\\(lq": '"',
    "\\(rq": '"',
    "\\ ": " ",
    "\\|": "",
    "\\(dq": '"',
    "\\^": "",
}


def from_man(path: Path) -> str:
    """Text of the man and mdoc macros; tables and literal blocks go."""
    parts, literal = [], False
    for line in read(path).split("\n"):
        found = re.match(r"\.\s*(\w+)\s*(.*)", line)
        if found is None:
            if not literal and not line.startswith((".", "'\\")):
                parts.append(f"{line}\n")
            continue
        macro, rest = found.group(1), found.group(2).replace('"', "")
        if macro in ("nf", "EX", "Bd", "TS"):
            literal = True
        elif macro in ("fi", "EE", "Ed", "TE"):
            literal = False
        elif macro in _MAN_BREAKS:
            title = rest if macro in _MAN_HEADINGS or macro == "It" else ""
            parts.append(f"\n\n{title}" + ("\n\n" if macro in _MAN_HEADINGS else "\n"))
        elif macro in _MAN_INLINE:
            parts.append(f"{rest}\n")
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\s[-+]?\d", "", "".join(parts))
    for code, meant in _MAN_ESCAPES.items():
        text = text.replace(code, meant)
    return squeeze(text)


def dict_entries(folder: Path, name: str) -> list[str]:
    """Entries of a dictd dictionary, each once, in the order of the file."""
    data = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())

    def number(text: str) -> int:
        value = 0
        for letter in text:
            value = value * 64 + _BASE64[letter]
        return value

    places = {}
    for line in (folder / f"{name}.index").read_text(errors="replace").split("\n"):
        fields = line.split("\t")
        if len(fields) >= 3 and not fields[0].startswith("00"):
            places[number(fields[1])] = number(fields[2])
    return [data[at : at + size].decode("utf-8", "replace") for at, size in sorted(places.items())]


def sword_texts(folder: Path) -> list[str]:
    """The testaments of a compressed SWORD module, marked up."""
    texts = []
    for index_file in sorted(folder.glob("*.[bc]zs")):
        index = index_file.read_bytes()
        data = index_file.with_suffix(index_file.suffix[:2] + "zz").read_bytes()
        parts = []
        for start in range(0, len(index) - 11, 12):
            at, size, _ = struct.unpack("<III", index[start : start + 12])
            if size:
                parts.append(zlib.decompress(data[at : at + size]).decode("utf-8", "replace"))
        texts.append("\n".join(parts))
    return texts


def without_markup(text: str) -> str:
    """OSIS or ThML as text."""
    text = re.sub(r"<note.*?</note>", "", text, flags=re.S)
    text = re.sub(r"<title type=\"x-?[^>]*>.*?</title>", "", text, flags=re.S)
    text = re.sub(r"<(lb|p|/p|div|/div|/l|br|CM|title|/title)[^>]*>", "\n\n", text)
    return html.unescape(re.sub(r"<[^>]*>", "", text))


def r_strings(path: Path) -> list[list[str]]:
    """The long character vectors of an R lazy-load database: zlib streams of serialised strings."""
    raw, found, at = path.read_bytes(), [], 0
    while (at := raw.find(b"\x78", at)) >= 0:
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(raw[at:])
        except zlib.error:
            at += 1
            continue
        at += len(raw) - at - len(stream.unused_data) if stream.eof else 1
        strings = _strings(data) if stream.eof else []
        if len(strings) > 1000:
            found.append(strings)
    return found


def _strings(data: bytes) -> list[str]:
    header, strings, at = re.compile(rb"\x00[\x00-\x07]\x00\x09(....)", re.S), [], 0
    while match := header.search(data, at):
        size = struct.unpack(">i", match.group(1))[0]
        if -1 <= size < 2000:
            at = match.end() + max(0, size)
            strings.append(data[match.end() : at].decode("utf-8", "replace"))
        else:
            at = match.start() + 1
    return strings
