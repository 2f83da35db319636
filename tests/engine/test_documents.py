"""Reading documents: files, folders, pipes, standard input, PDF, what is left out, and what is refused."""

import io
import os
import sys
import threading

import pytest

from opensala.engine.documents import Skipped, join_documents, read_documents

from ..pdfs import encrypted, make_pdf

FACT = "The vault code is 4821."


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def only(path):
    """The one document of a source, read without remarks."""
    reading = read_documents([str(path)])
    assert reading.notes == [] and reading.skipped == []
    return reading.documents[0].text


def test_text_markdown_and_code_are_taken_as_they_are(tmp_path):
    write(tmp_path, {"a.md": b"\xef\xbb\xbf# Title\r\ntext \xc3\xa9\n"})
    assert only(tmp_path / "a.md") == "# Title\ntext é\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_with_a_byte_order_mark(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("-be") else ""
    write(tmp_path, {"a.txt": (mark + "naïve 数\r\n").encode(encoding)})
    assert only(tmp_path / "a.txt") == "naïve 数\n"


def test_folders_give_their_text_files_in_order_and_list_the_others(tmp_path):
    write(
        tmp_path,
        {
            "b.txt": b"two",
            "a/x.py": b"one",
            ".hidden": b"no",
            ".notes/c.txt": b"no",
            "__pycache__/c.py": b"no",
            "image.png": b"\x89PNG\x00\xff",
            "latin.txt": b"caf\xe9",
            "wide.txt": "three".encode("utf-16"),
            "empty.txt": b" \n",
            "scan.pdf": make_pdf([[], []]),
        },
    )
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").symlink_to(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "pipe")
    reading = read_documents([str(tmp_path)])
    assert [d.text for d in reading.documents] == ["one", "two", "two", "three"]
    joined = join_documents(reading.documents)
    assert joined.index("x.py ===\none") < joined.index("b.txt ===\ntwo")
    reasons = {os.path.relpath(s.name, tmp_path): s.reason for s in reading.skipped}
    assert len(reasons) == len(reading.skipped)
    assert {name: reason.split(" (")[0] for name, reason in reasons.items()} == {
        ".hidden": "hidden",
        ".notes": "hidden",
        "__pycache__": "a folder of tools",
        "image.png": "looks like a binary file",
        "latin.txt": "not UTF-8 text",
        "empty.txt": "empty",
        "scan.pdf": "a PDF without text",
        "linked": "a link to a directory, not followed",
        "round": "a link to a directory, not followed",
        "itself": "cannot be read",
        "gone": "a link to nothing",
        "pipe": "a pipe, socket or device",
    }


def test_folders_nested_deeper_than_pythons_stack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("shallow")
    for _ in range(2100):  # one step at a time: the whole path is too long for one call
        os.mkdir("d")
        os.chdir("d")
    deepest = os.open(".", os.O_RDONLY)
    try:
        os.chdir(tmp_path)
        reading = read_documents(["."])
        assert [d.text for d in reading.documents] == ["shallow"]
        assert [s.reason for s in reading.skipped] == ["cannot be read (File name too long)"]
    finally:
        os.chdir(deepest)
        os.close(deepest)
        for _ in range(2100):
            os.chdir("..")
            os.rmdir("d")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_read_in_a_folder_is_listed(tmp_path, monkeypatch, what):
    write(tmp_path, {"a.txt": b"one", "locked/b.txt": b"two"})
    locked = tmp_path / "locked" / "b.txt" if what == "file" else tmp_path / "locked"
    deny(monkeypatch, locked)
    reading = read_documents([str(tmp_path)])
    assert [d.text for d in reading.documents] == ["one"]
    assert reading.skipped == [Skipped(str(locked), "cannot be read (Permission denied)")]


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch):
    deny(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: cannot be read .Permission denied.$"):
        read_documents([str(tmp_path)])


def deny(monkeypatch, path):
    """No permission for one path, also where root, who may read everything, runs the tests."""
    real_open, real_scandir = open, os.scandir

    def refuse(real, given, *arguments):
        if os.fspath(given) == str(path):
            raise PermissionError(13, "Permission denied", str(given))
        return real(given, *arguments)

    monkeypatch.setattr("builtins.open", lambda *a, **k: refuse(real_open, *a, **k))
    monkeypatch.setattr(os, "scandir", lambda given: refuse(real_scandir, given))


def test_names_that_are_not_utf8_or_hold_line_breaks_are_escaped(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\nx.txt")
    write(tmp_path, {name: b"one", name[:-3] + "bin": b"\0"})
    reading = read_documents([str(tmp_path)])
    for shown in (reading.documents[0].name, reading.skipped[0].name):
        assert "\n" not in shown and shown.encode()
    assert read_documents([name]).documents[0].text == "one"


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    assert read_documents(["-"]).documents[0].text == "from a pipe"


def test_standard_input_closed_or_given_twice(monkeypatch):
    with pytest.raises(ValueError, match="^- is given twice"):
        read_documents(["-", "-"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="^standard input: it is closed$"):
        read_documents(["-"])


def test_named_pipes_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("from a fifo",))
    writer.start()
    assert only(tmp_path / "pipe") == "from a fifo"
    writer.join()


def test_pdf_text(tmp_path):
    write(tmp_path, {"a.pdf": make_pdf([[FACT, "Second line."]])})
    assert only(tmp_path / "a.pdf").split("\n")[:2] == [FACT, "Second line."]


@pytest.mark.parametrize("before", [b"\n\n", b"\0\r\n", b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n"])
def test_pdf_after_something_else(tmp_path, monkeypatch, before):
    data = before + make_pdf([[FACT]])
    write(tmp_path, {"a.pdf": data})
    assert only(tmp_path / "a.pdf").strip() == FACT
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert only("-").strip() == FACT


def test_text_about_pdf_is_text(tmp_path):
    write(tmp_path, {"a.txt": b"A PDF begins with\n%PDF-1.4\nand a number."})
    assert "begins with" in only(tmp_path / "a.txt")


def test_pdf_with_an_owners_password_is_read_and_one_with_a_users_is_refused(tmp_path):
    data = make_pdf([[FACT]])
    write(tmp_path, {"owner.pdf": encrypted(data, "", "secret"), "user.pdf": encrypted(data, "u", "secret")})
    assert only(tmp_path / "owner.pdf").strip() == FACT
    with pytest.raises(ValueError, match="user.pdf: a PDF that needs a password; decrypt it first"):
        read_documents([str(tmp_path / "user.pdf")])


def test_pdf_pages_without_text_are_named(tmp_path):
    write(tmp_path, {"a.pdf": make_pdf([[], [FACT], [], [], []])})
    reading = read_documents([str(tmp_path / "a.pdf")])
    assert reading.documents[0].text.strip() == FACT
    assert len(reading.notes) == 1 and "a.pdf: pages 1, 3-5 of 5 without text" in reading.notes[0]


def test_pdf_pages_that_cannot_be_read_are_named(tmp_path):
    data = make_pdf([[FACT], ["Second page."]])
    second = data.rindex(b" >>\nstream")
    broken = data[:second] + b"/Filter /Fancy" + data[second:]
    write(tmp_path, {"a.pdf": broken, "b.pdf": make_pdf([[FACT]], b"/Filter /Fancy ")})
    reading = read_documents([str(tmp_path / "a.pdf")])
    assert reading.documents[0].text.strip() == FACT
    assert any("page 2 cannot be read (NotImplementedError" in note for note in reading.notes)
    with pytest.raises(ValueError, match="b.pdf: a PDF without text: page 1 cannot be read .NotImpl"):
        read_documents([str(tmp_path / "b.pdf")])


def test_pdf_characters_that_cannot_be_decoded_are_counted(tmp_path):
    write(tmp_path, {"a.pdf": make_pdf([["code " + chr(0) + " 4821"]])})
    reading = read_documents([str(tmp_path / "a.pdf")])
    assert reading.documents[0].text.strip() == "code \ufffd 4821"
    assert "a.pdf: 1 characters could not be decoded" in reading.notes[0]


def test_pdf_that_had_to_be_repaired_says_so(tmp_path):
    data = make_pdf([[FACT]])
    write(tmp_path, {"a.pdf": data.replace(b"startxref\n", b"startxref\n9")})
    reading = read_documents([str(tmp_path / "a.pdf")])
    assert reading.documents[0].text.strip() == FACT
    assert "a.pdf: not quite a valid PDF, text may be missing (pypdf warned" in reading.notes[0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t", "empty"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 text .byte 0xe9 at offset 3.; convert it first"),
        ("a.txt", b"\xff\xfea\0b", "not UTF-16-LE text .byte 0x62 at offset 4."),
        ("a.bin", b"abc\0def", "looks like a binary file"),
        ("a.txt", "no mark".encode("utf-16-le"), "looks like a binary file"),
        ("a.pdf", b"%PDF-1.4 nonsense", "not a readable PDF"),
        ("a.pdf", make_pdf([]), "a PDF without text .0 pages"),
        ("a.pdf", make_pdf([[], []]), "a PDF without text .2 pages, blank or only images.; run OCR"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, data, message):
    write(tmp_path, {name: data})
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: {message}") as refused:
        read_documents([str(tmp_path / name)])
    assert "\n" not in str(refused.value)


def test_devices_without_end_are_refused():
    for device in ("/dev/zero", "/dev/urandom"):
        with pytest.raises(ValueError, match=f"^{device}: looks like a binary file"):
            read_documents([device])


def test_missing_files_empty_names_and_folders_without_text(tmp_path):
    with pytest.raises(ValueError, match="none.txt: no such file"):
        read_documents([str(tmp_path / "none.txt")])
    with pytest.raises(ValueError, match="no text files in this directory$"):
        read_documents([str(tmp_path)])
    write(tmp_path, {"a.bin": b"\0"})
    with pytest.raises(
        ValueError, match=r"no text files in this directory \(1 skipped, first: .*a.bin: looks like"
    ):
        read_documents([str(tmp_path)])
    with pytest.raises(ValueError, match="^a document's name is empty"):
        read_documents([""])
    with pytest.raises(ValueError, match="^no document given"):
        read_documents([])
