"""Small PDFs written by hand, for tests: pages with text, pages with an image only, and encrypted ones."""

import contextlib
import io

import psutil
from pypdf import PdfReader, PdfWriter


def make_pdf(pages, extra=b""):
    """A PDF with one page for each list of lines; an empty list gives a page that only holds an image."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    image = (
        b"<< /Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8 "
    )
    objects.append(image + b"/Length 1 >>\nstream\n\x80\nendstream")
    kids = []
    for lines in pages:
        shown = b" ".join(f"({line}) Tj 0 -14 Td".encode() for line in lines)
        content = b"BT /F1 12 Tf 72 720 Td " + shown + b" ET" if lines else b"/Im1 Do"
        objects.append(b"<< /Length %d %s>>\nstream\n%s\nendstream" % (len(content), extra, content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources "
            b"<< /Font << /F1 3 0 R >> /XObject << /Im1 4 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return out + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF"
        % (size, table, size, len(out))
    )


def long_pdf():
    """A PDF that takes seconds to read."""
    return make_pdf([["Nothing of note happened that day."] * 40] * 4000)


def pdf_processes():
    """Processes of this one that read PDFs."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            found += [process] if "pdf.py" in " ".join(process.cmdline()) else []
    return found


def encrypted(data, user, owner):
    """The PDF encrypted with RC4 (which needs no other package): a password to open it, one to change it."""
    writer, out = PdfWriter(clone_from=PdfReader(io.BytesIO(data))), io.BytesIO()
    writer.encrypt(user_password=user, owner_password=owner, algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()
