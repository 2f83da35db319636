"""Reading documents: files, folders, standard input, PDF, and everything that is refused."""

import io
import sys

import pytest

from opensala.engine.documents import join_documents, read_documents


def pdf(path, lines):
    """The smallest PDF with one page of text."""
    text = "BT /F1 12 Tf 72 720 Td " + " ".join(f"({line}) Tj 0 -14 Td" for line in lines) + " ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 "
        "5 0 R >> >> >>",
        f"<< /Length {len(text)} >>\nstream\n{text}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = b"%PDF-1.4\n", []
    for n, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{n} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{o:010} 00000 n \n" for o in offsets)
    out += (
        f"xref\n0 6\n0000000000 65535 f \n{table}trailer << /Size 6 /Root 1 0 R "
        f">>\nstartxref\n{len(out)}\n%%EOF"
    ).encode()
    path.write_bytes(out)


def test_text_markdown_and_code_are_taken_as_they_are(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# Title\r\ntext \xc3\xa9\n")
    assert read_documents([str(tmp_path / "a.md")])[0].text == "# Title\ntext é\n"


def test_folders_give_their_text_files_in_order(tmp_path):
    for name, data in {
        "b.txt": b"two",
        "a/x.py": b"one",
        ".hidden": b"no",
        "__pycache__/c.py": b"no",
        "image.png": b"\x89PNG\x00\xff",
        "empty.txt": b" \n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    documents = read_documents([str(tmp_path)])
    assert [d.text for d in documents] == ["one", "two"]
    joined = join_documents(documents)
    assert joined.index("x.py ===\none") < joined.index("b.txt ===\ntwo")


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    assert read_documents(["-"])[0].text == "from a pipe"


def test_pdf_text(tmp_path):
    pdf(tmp_path / "a.pdf", ["The vault code is 4821.", "Second line."])
    assert "The vault code is 4821." in read_documents([str(tmp_path / "a.pdf")])[0].text


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t", "empty"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 text .byte 0xe9 at offset 3."),
        ("a.bin", b"abc\0def", "binary file"),
        ("a.pdf", b"%PDF-1.4 nonsense", "not a readable PDF"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_documents([str(tmp_path / name)])


def test_missing_files_and_folders_without_text(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_documents([str(tmp_path / "none.txt")])
    with pytest.raises(ValueError, match="no text files"):
        read_documents([str(tmp_path)])
