"""The page in Chromium, as people use it: scenarios.mjs, run by playwright-core against a live server.

It needs Chromium (Debian: apt-get install chromium; or its path in OPENSALA_CHROMIUM), Node 18 or later, and
`npm ci` in tests/page/browser. Without them the tests are skipped and say what is missing.
"""

import imaplib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from opensala.engine import Engine
from opensala.server import KeyFile, ServerOptions, new_key

from ..server.conftest import DOCUMENT, FILLER, OPTIONS, QUESTION, Live

HERE = Path(__file__).parent / "browser"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("OPENSALA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def missing():
    if CHROMIUM is None:
        return "Chromium is not installed (apt-get install chromium, or set OPENSALA_CHROMIUM)"
    if shutil.which("node") is None:
        return "Node is not installed (apt-get install nodejs npm)"
    if not (HERE / "node_modules" / "playwright-core").is_dir():
        return "playwright-core is not installed (npm ci in tests/page/browser)"
    return None


pytestmark = [pytest.mark.browser, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
# A module of the standard library as it is: one of its lines says what is asked for.
REAL = Path(imaplib.__file__)
FOUND = {"file": str(REAL), "text": "What is the value of IMAP4_SSL_PORT?", "answer": "993"}
FOUND["fact"] = r"IMAP4_SSL_PORT = 993"
CAPTAIN = {"text": "Who is the captain of Silver Heron?", "answer": "Orla Brandt"}


@pytest.fixture(scope="module")
def browser():
    """Runs a scenario; gives what it returns."""
    driver = subprocess.Popen(
        ["node", "drive.mjs", CHROMIUM], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(name, url, **given):
        driver.stdin.write(json.dumps({"name": name, "url": url, **given}) + "\n")
        driver.stdin.flush()
        outcome = json.loads(driver.stdout.readline())
        assert outcome["ok"], outcome["error"]
        return outcome.get("result")

    yield run
    driver.stdin.close()
    driver.wait(30)


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    engine = Engine(model.model, model.tokenizer, OPTIONS)
    server = Live(engine, contexts=tmp_path_factory.mktemp("page") / "kept")
    yield server.url
    server.stop()
    engine.check_integrity()


@pytest.fixture
def note(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text(DOCUMENT)
    return {"file": str(path), "text": QUESTION, "answer": "48213"}


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (360, "dark")])
def test_a_real_document_its_answer_and_the_block_that_holds_the_fact(browser, url, width, scheme):
    found = browser("finds", url, width=width, scheme=scheme, **FOUND)
    assert found["block"] > 0


def test_everything_by_keyboard(browser, url):
    assert browser("keyboard", url, **FOUND)["passages"] > 5


def test_a_folder(browser, url, tmp_path):
    folder = tmp_path / "papers"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(FILLER * 200)
    (folder / "b.md").write_text(FILLER * 40 + "The captain of Silver Heron is Orla Brandt.\n" + FILLER * 90)
    (folder / "deep" / "c.txt").write_text(FILLER * 200)
    (folder / ".hidden.txt").write_text("secret")
    (folder / "image.bin").write_bytes(bytes(range(256)))
    (folder / "nothing.txt").write_text("")
    browser("folder", url, folder=str(folder), whose="papers/b.md", **CAPTAIN)


def test_what_is_dropped(browser, url):
    browser("drop", url, text=DOCUMENT)


def test_a_short_document(browser, url, note):
    browser("short", url, **note)


def test_what_is_kept(browser, url, note, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("The captain of Silver Heron is Orla Brandt.\n")
    browser("library", url, **note, more={"file": str(more), **CAPTAIN}, told=["404"])


def test_a_reading_that_is_stopped(browser, url, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text(FILLER * 3000)
    browser("stop", url, file=str(long))


def test_a_key_is_asked_for(browser, start, tmp_path):
    path = tmp_path / "keys.json"
    key = new_key(path, "ada")[1]
    live = start(keys=KeyFile(path), contexts=tmp_path / "kept")
    browser("door", live.url, key=key, told=["401"])


def test_a_failure_in_the_server_is_told(browser, start, note, tmp_path, monkeypatch):
    live = start(contexts=tmp_path / "kept")
    engine = live.service.engine
    step = engine.step

    def fail_on_questions():
        if any(s.params.selection for s in engine.scheduler.sequences()):
            raise RuntimeError("out of something")
        return step()

    monkeypatch.setattr(engine, "step", fail_on_questions)
    browser("fails", live.url, **{k: note[k] for k in ("file", "text")}, words="the engine failed")


def test_what_the_server_does_not_take(browser, start, tmp_path):
    live = start(ServerOptions(max_body_bytes=64 << 10, grace_seconds=0.5), contexts=tmp_path / "kept")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing")
    (tmp_path / "large.txt").write_text(FILLER * 2000)
    files = {name: str(next(tmp_path.glob(f"{name}.*"))) for name in ("broken", "large")}
    browser("refused", live.url, **files, told=["400"])


def test_a_server_that_does_not_answer(browser, url, note):
    browser("lost", url, **note, told=["ERR_INTERNET_DISCONNECTED"])


def test_a_server_without_a_folder(browser, live):
    browser("bare", live.url)
