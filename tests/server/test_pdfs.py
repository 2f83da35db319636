"""PDFs read in processes of their own: what they give, what bounds them, and how they end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
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
    def no_thread(*args, **options):
        raise RuntimeError("can't start new thread")

    for name, value in (("sys.executable", "/nowhere/python"), ("subprocess.Popen", no_thread)):
        with monkeypatch.context() as patch, pytest.raises(ApiError) as refused:
            patch.setattr(name, value)
            read(make_pdf([["yes"]]))
        assert refused.value.status == 503 and "nowhere" not in refused.value.message


def test_a_process_that_is_killed_is_no_fault_of_the_file():
    async def scenario():
        task = asyncio.create_task(PdfReader().read("", LONG))
        while not pdf_processes():
            await asyncio.sleep(0.01)
        pdf_processes()[0].kill()
        with pytest.raises(ApiError, match="from outside") as refused:
            await task
        assert refused.value.status == 503

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_reader_that_is_closed_ends_what_it_reads():
    async def scenario():
        reader = PdfReader()
        waiting = [asyncio.create_task(reader.read(owner, LONG)) for owner in ("a", "a", "b")]
        while len(pdf_processes()) < 2:
            await asyncio.sleep(0.01)
        reader.close()
        for ended in [*await asyncio.gather(*waiting, return_exceptions=True), await refusal(reader)]:
            assert isinstance(ended, ApiError) and ended.status == 503 and "shutting down" in ended.message
        assert not pdf_processes()

    async def refusal(reader):
        return (await asyncio.gather(reader.read("a", b"%PDF-"), return_exceptions=True))[0]

    asyncio.run(asyncio.wait_for(scenario(), 60))


PARENT = """
import asyncio, sys
from pathlib import Path
from opensala.server.pdfs import PdfReader
asyncio.run(PdfReader().read("", Path(sys.argv[1]).read_bytes()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere its bounds alone end it")
def test_a_process_ends_with_a_server_that_is_killed(tmp_path):
    (tmp_path / "a.pdf").write_bytes(LONG)
    server = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "a.pdf")], cwd=Path(__file__).parents[2]
    )
    try:
        until = time.monotonic() + 30
        while not (found := psutil.Process(server.pid).children()) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.5)  # it has begun to read
        server.send_signal(signal.SIGKILL)
        server.wait()
        assert found and not psutil.wait_procs(found, timeout=2)[1]
    finally:
        server.kill()


def test_a_process_whose_server_is_gone_does_not_begin():
    program = Path(__file__).parents[2] / "opensala" / "engine" / "pdf.py"
    words = [sys.executable, "-P", str(program), "10", str(4 << 30)]
    whole = make_pdf([["yes"]])
    said = [
        subprocess.run([*words, str(p)], input=whole, capture_output=True) for p in (os.getpid(), 1 << 30)
    ]
    assert b"yes" in said[0].stdout and (said[1].stdout, said[1].returncode) == (b"", 0)


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
