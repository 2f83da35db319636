"""Seeded odd documents: whatever they hold, the outcome is text, or a ValueError of one line.

Where the right outcome is known (this text, or a refusal), it is demanded; of a damaged PDF it is demanded
that text which got lost is mentioned.
"""

import os
import random
import re
import signal
import zlib
from contextlib import contextmanager

import pytest

from opensala.engine.documents import join_documents, read_documents

from .pdfs import encrypted, make_pdf

SECONDS = 20  # for one case; a healthy one takes milliseconds
LINES = [f"Line {n} of the report says nothing of interest." for n in range(6)]
PDF = make_pdf([LINES[:3], LINES[3:]])


@contextmanager
def alarm():
    """A document that is read for ever fails its test instead of hanging all of them."""

    def late(number, frame):
        raise TimeoutError(f"still reading after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(*sources):
    """What was read, or the refusal; both checked for what holds of every case."""
    with alarm():
        try:
            reading = read_documents([os.fspath(source) for source in sources])
        except ValueError as error:
            assert type(error) is ValueError and "\n" not in str(error)
            assert re.match(r"[^ ].*: [^ ]", str(error)), f"no name or no reason: {error}"
            assert len(str(error).encode()) < 1000 + sum(len(os.fspath(s)) for s in sources)
            return str(error)
    for document in reading.documents:
        assert document.text.strip() and "\0" not in document.text
    for line in [*reading.notes, *(f"{s.name}: {s.reason}" for s in reading.skipped)]:
        assert re.fullmatch(r"[^\n]*: [^\n]+", line) and line.encode()
    join_documents(reading.documents).encode()
    return reading


def read(path, data):
    path.write_bytes(data)
    return outcome(path)


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes(tmp_path, seed):
    """All of them, those of text, and those with the beginning of a kind that is known."""
    rng = random.Random(seed)
    begin = rng.choice(
        [b"", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"%PDF-1.7\n"]
    )
    alphabet = rng.choice([range(256), range(1, 128), b" \t\r\n", b"\0a", range(128, 256)])
    data = begin + bytes(rng.choice(alphabet) for _ in range(rng.choice([0, 1, 2, 3, 50, 3000])))
    result = read(tmp_path / "a", data)
    if begin == b"" and not isinstance(result, str):
        assert result.documents[0].text == data.decode().replace("\r\n", "\n")


ENCODINGS = ["latin-1", "cp1252", "gb18030", "shift-jis", "koi8-r", "utf-7", "utf-8", "utf-8-sig"]
ENCODINGS += ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "cp037"]
TEXTS = {
    "plain": "The vault code is 4821.\r\n",
    "accents": "Où est la clé ? Ça va.",
    "wide": "数据库密码是四。ключ",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", TEXTS)
def test_encodings_are_right_or_refused(tmp_path, kind, encoding):
    text = TEXTS[kind]
    result = read(tmp_path / "a.txt", text.encode(encoding, "replace"))
    if encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert result.documents[0].text == text.replace("\r\n", "\n")
    elif not isinstance(result, str):  # bytes that are the same in UTF-8
        decoded = result.documents[0].text
        assert text.encode(encoding, "replace").decode() == decoded.replace(
            "\n", "\r\n" if "\r" in text else "\n"
        )


def mutate(rng, data):
    """One kind of damage: cut short, bytes changed, a stretch lost, repeated or moved, numbers made huge."""
    kind = rng.choice(["cut", "bytes", "lose", "repeat", "move", "number", "word", "zeros"])
    a, b = sorted(rng.sample(range(len(data)), 2))
    if kind == "cut":
        return data[:b]
    if kind == "lose":
        return data[:a] + data[min(b, a + 200) :]
    if kind == "repeat":
        return data[:b] + data[a:b] + data[b:]
    if kind == "move":
        return data[a:b] + data[:a] + data[b:]
    if kind == "zeros":
        return data[:a] + bytes(min(b - a, 60)) + data[a + min(b - a, 60) :]
    if kind == "number":
        places = [m.span() for m in re.finditer(rb"\d+", data)]
        start, end = rng.choice(places)
        return data[:start] + rng.choice([b"-1", b"0", b"99999999999", b"1e9", b"3.7"]) + data[end:]
    if kind == "word":
        places = [m.span() for m in re.finditer(rb"/\w+", data)]
        start, end = rng.choice(places)
        return (
            data[:start]
            + rng.choice([b"/Pages", b"null", b"/Kids", b"(x)", b"[1 0 R]", b"<< >>"])
            + data[end:]
        )
    out = bytearray(data)
    for _ in range(rng.randrange(1, 12)):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def compressed_pdf():
    """The same pages with compressed streams, as most programs write them."""
    data = make_pdf([LINES[:3], LINES[3:]])
    for stream in re.findall(rb"stream\n(BT.*?)\nendstream", data, re.S):
        packed = zlib.compress(stream)
        data = data.replace(
            b"<< /Length %d >>\nstream\n%s\n" % (len(stream), stream),
            b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\n" % (len(packed), packed),
        )
    return data


BASES = {"plain": PDF, "compressed": compressed_pdf(), "encrypted": encrypted(PDF, "", "owner")}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("seed", range(30))
def test_damaged_pdfs(tmp_path, base, seed):
    rng, data = random.Random(seed), BASES[base]
    for _ in range(rng.choice([1, 1, 2, 5])):
        data = mutate(rng, data)
    result = read(tmp_path / "a.pdf", data)
    if not isinstance(result, str) and b"%PDF-" in data[:1024]:
        text = result.documents[0].text
        assert "endobj" not in text, "the source of a PDF is no text of it"
        if base == "compressed":  # in streams without checksums a changed letter cannot be noticed
            assert all(line in text for line in LINES) or result.notes


NAMES = [
    b"a b.txt",
    b"caf\xc3\xa9.txt",
    b"caf\xe9.txt",
    b"new\nline.txt",
    b"tab\t.txt",
    b"-q",
    b"--json",
    b"\xff\xfe",
]
NAMES += [
    b"=== x ===",
    b"\x1b[31mred",
    b"'\"`$(x)",
    b"x" * 255,
    "数.txt".encode(),
    "\u202egpj".encode(),
    b"\x7f",
    b"...",
]


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[2:22] for name in NAMES])
def test_odd_names(tmp_path, name):
    """Alone (by its path) each is read; in a folder too, unless it is hidden."""
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(b"inside")
    assert outcome(os.fsdecode(path)).documents[0].text == "inside"
    result = outcome(tmp_path)
    if name.startswith(b"."):
        assert "hidden" in result
    else:
        assert [d.text for d in result.documents] == ["inside"]
        assert result.documents[0].name.isprintable()


@pytest.mark.parametrize(
    "source", ["", "\0", "a\0b", "x" * 300, "y/" * 3000, "nowhere", "\udce9", "\ud800", "/dev/null"]
)
def test_sources_that_name_nothing(source):
    assert isinstance(outcome(source), str)


def grow(rng, folder, contents, depth=0):
    """A random tree: text, binaries, links in circles and to nothing, pipes; counts each file of text."""
    for number in range(rng.randrange(1, 5)):
        path = folder / f"{rng.choice(['', '', '.'])}{rng.choice('abc')}{number}"
        kind = rng.choice(["text", "text", "binary", "folder", "round", "gone", "self", "up", "pipe", "pdf"])
        if kind == "folder" and depth < 4:
            path.mkdir()
            grow(rng, path, contents, depth + 1)
        elif kind in ("round", "gone", "self", "up"):
            goal = {"round": folder, "gone": folder / "gone", "self": path, "up": folder.parent}[kind]
            path.symlink_to(goal)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "text":
            path.write_text(f"text {len(contents)}")
            contents[str(path)] = path.read_text()
        else:
            path.write_bytes(b"\0\1" if kind == "binary" else PDF[: rng.randrange(len(PDF))])


@pytest.mark.parametrize("seed", range(24))
def test_random_trees(tmp_path, seed):
    """Every text that is in sight is read once, and everything else is listed once."""
    rng, contents = random.Random(seed), {}
    top = tmp_path / "top"
    top.mkdir()
    grow(rng, top, contents)
    visible = {p: t for p, t in contents.items() if not any(x.startswith(".") for x in p.split("/")[1:])}
    result = outcome(top)
    if isinstance(result, str):
        assert not visible and "no text files in this directory" in result
        return
    read_as_text = {d.name: d.text for d in result.documents}
    assert len(read_as_text) == len(result.documents)
    assert visible.items() <= read_as_text.items()
    listed = {s.name for s in result.skipped} | set(read_as_text)
    assert len(listed) == len(result.skipped) + len(result.documents)
    for name in os.listdir(top):
        inside = [path for path in listed if path == str(top / name) or path.startswith(f"{top / name}/")]
        empty = (top / name).is_dir() and not any(files for _, _, files in os.walk(top / name))
        assert inside or empty, f"{name} was dropped without a word"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
)
def test_failures_of_the_disk(tmp_path, monkeypatch, seed, error):
    """Files and folders that cannot be opened, drawn at random: listed in a folder, refused alone."""
    rng = random.Random(seed)
    for number in range(8):
        path = tmp_path / f"d{number % 3}" / f"f{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {number}")
    bad = {str(p) for p in tmp_path.rglob("*") if rng.random() < 0.4}
    reachable = {str(p) for p in tmp_path.glob("d*/*") if str(p.parent) not in bad}
    real_open, real_scandir = open, os.scandir

    def failing(real, path, *arguments, **options):
        if os.fspath(path) in bad:
            raise error
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", lambda *a, **k: failing(real_open, *a, **k))
    monkeypatch.setattr(os, "scandir", lambda *a: failing(real_scandir, *a))
    result = outcome(tmp_path)
    if isinstance(result, str):
        assert reachable <= bad and error.strerror in result
    else:
        assert {d.name for d in result.documents} == reachable - bad
        assert {s.name for s in result.skipped} == bad - {p for p in bad if os.path.dirname(p) in bad}
        assert all(error.strerror in s.reason for s in result.skipped)
    for path in sorted(bad):
        assert error.strerror in outcome(path)
