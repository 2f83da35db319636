"""PDFs read in processes of their own: what they give, what bounds them, and how they end."""

import asyncio

import pytest

from opensala.engine.pdf import pdf_text
from opensala.server.errors import ApiError
from opensala.server.pdfs import PdfReader

from ..pdfs import encrypted, long_pdf, make_pdf, pdf_processes

LONG = long_pdf()


def read(data, reader=None):
    return asyncio.run((reader or PdfReader()).read("", data))


def test_it_says_what_reading_in_this_process_says():
    for data in (make_pdf([["The vault code is 4821."], []]), make_pdf([["caf\\351 \\200"]])):
        assert read(data) == pdf_text(data)


def test_a_file_without_text_is_refused_with_the_same_reason():
    for data in (make_pdf([[]]), b"%PDF-1.4\n%%EOF", encrypted(make_pdf([["a"]]), "secret", "other")):
        with pytest.raises(ValueError) as expected:
            pdf_text(data)
        with pytest.raises(ValueError) as found:
            read(data)
        assert str(found.value) == str(expected.value)


def test_a_file_that_takes_too_much_is_refused():
    with pytest.raises(ValueError, match="takes more than 1 s to read"):
        read(LONG, PdfReader(seconds=1))
    # Python that has no memory left raises that, fails in other ways, or goes round in circles.
    with pytest.raises(ValueError, match="memory to read|3 s to read|not a readable PDF"):
        read(LONG, PdfReader(seconds=3, memory=64 << 20))
    assert not pdf_processes()


def test_no_process_is_no_fault_of_the_file(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ApiError) as refused:
        read(make_pdf([["yes"]]))
    assert refused.value.status == 503 and "nowhere" not in refused.value.message


def test_a_process_ends_with_whoever_waits_for_it():
    async def scenario():
        reader = PdfReader()
        waiting = [asyncio.create_task(reader.read(owner, LONG)) for owner in ("a", "a", "b", "c")]
        while len(pdf_processes()) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert len(pdf_processes()) == 2  # of two owners, however many wait
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not pdf_processes()
        assert (await reader.read("a", make_pdf([["yes"]])))[0].strip() == "yes"

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_one_owner_does_not_keep_others_waiting():
    order = []

    class Slow(PdfReader):
        async def _read(self, data):
            await asyncio.sleep(0.01)
            order.append(data)
            return "", []

    async def scenario():
        reader = Slow()
        await asyncio.gather(*(reader.read("many", b"m") for _ in range(6)), reader.read("one", b"o"))

    asyncio.run(scenario())
    assert b"o" in order[:2] and order.count(b"m") == 6
