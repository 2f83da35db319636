"""Where documents and data come from: the cache of generated documents, the hub."""

import json
import sys

import pytest
from transformers import AutoTokenizer

from opensala.cli import main
from opensala.data.prompts import PromptFormat
from opensala.data.ruler import TASKS
from opensala.engine import shipped_model
from opensala.evaluate import document_cache
from opensala.evaluate.document_cache import DocumentCache, default_folder
from opensala.evaluate.hub import data_path
from opensala.evaluate.mrcr import MRCRSuite
from opensala.evaluate.ruler import RulerSuite


@pytest.fixture(scope="module")
def form():
    return PromptFormat(AutoTokenizer.from_pretrained(shipped_model()))


@pytest.mark.parametrize("name", ["niah_multiquery", "qa_1", "cwe"])
def test_kept_documents_are_the_ones_made(form, tmp_path, monkeypatch, name):
    cache = DocumentCache(tmp_path, form)
    made = cache.document(TASKS[name], 2048, 1, 7, 3)
    fitted = TASKS[name].document(2048, form, index=1, seed=7, questions=3)
    assert tuple(made[0]) == fitted.prompts and made[1] == fitted.document.questions
    monkeypatch.setattr(type(TASKS[name]), "document", lambda *a, **k: pytest.fail("made again"))
    held = DocumentCache(tmp_path, form).document(TASKS[name], 2048, 1, 7, 3)
    assert (tuple(held[0]), held[1]) == (fitted.prompts, fitted.document.questions)
    assert all(type(token) is int for token in held[0][0][:3])


def test_another_document_is_another_file(form, tmp_path, monkeypatch):
    def count():
        return len(list(tmp_path.glob("*")))

    cache, task = DocumentCache(tmp_path, form), TASKS["niah_single_1"]
    for what in (
        (1024, 0, 0, 1),
        (1024, 1, 0, 1),
        (1024, 0, 1, 1),
        (1024, 0, 0, 2),
        (1100, 0, 0, 1),
        (1024, 0, 0, 1),
    ):
        cache.document(task, *what)
    assert count() == 5
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    tokenizer.add_tokens(["access"])
    DocumentCache(tmp_path, PromptFormat(tokenizer)).document(task, 1024, 0, 0, 1)
    assert count() == 6
    monkeypatch.setattr(document_cache, "generators_fingerprint", lambda: "changed")
    DocumentCache(tmp_path, form).document(task, 1024, 0, 0, 1)
    assert count() == 7


def test_broken_files_are_made_anew(form, tmp_path):
    suite = RulerSuite(("niah_single_1",), (1024,), samples=1, cache=tmp_path)
    (whole,) = next(suite.groups(form)).load()
    (file,) = tmp_path.glob("*.npz")
    for broken in (b"", b"PK\x03\x04 nothing", file.read_bytes()[:-200]):
        file.write_bytes(broken)
        assert next(suite.groups(form)).load()[0].prompt == whole.prompt
        assert len(file.read_bytes()) > 500
    RulerSuite(("niah_single_1",), (1100,), samples=1)
    assert list(tmp_path.glob("*")) == [file]


def test_the_usual_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "opensala" / "documents"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache as its client lays it out, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def add(name, **files):
        folder = tmp_path / "hub" / f"datasets--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("a" * 40)
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("a" * 40)
        for path, text in files.items():
            (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / path).write_text(text)

    return add


def test_files_from_the_hub(hub, form):
    row = {
        "prompt": json.dumps([{"role": "user", "content": "Tell me. " * 3000}]),
        "answer": "abc",
        "random_string_to_prepend": "a",
        "n_needles": 2,
    }
    hub(
        "openai/mrcr",
        **{
            "2needle/part.jsonl": json.dumps(row) + "\n",
            "4needle/part.jsonl": json.dumps(row | {"n_needles": 4}) + "\n",
        },
    )
    groups = list(MRCRSuite(data_path("mrcr", "hub")).groups(form))
    assert [g.ids for g in groups] == [("mrcr/2needle/part/1",), ("mrcr/4needle/part/1",)]
    hub("someone/mine", **{"test5.jsonl": "{}\n"})
    assert (data_path("livecodebench", "hub:someone/mine") / "test5.jsonl").exists()
    hub("someone/empty", **{"README.md": ""})
    with pytest.raises(ValueError, match=r"someone/empty holds none of test5\.jsonl, test6\.jsonl"):
        data_path("livecodebench", "hub:someone/empty")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nolima=hub", "amodaresi/NoLiMa could not be fetched from the hub"),
        ("nolima=hub", "give the folder: --data nolima=PATH"),
        ("mrcr=hub:not a name", "could not be fetched from the hub"),
        ("ruler=hub", "are not on the hub"),
        ("mrcr=no/where", "no/where does not exist; give a path, or hub to fetch openai/mrcr"),
        ("rulr=x", "suite must be one of ruler, mrcr, nolima, livecodebench, got 'rulr'"),
    ],
)
def test_what_cannot_be_fetched(hub, monkeypatch, capsys, entry, message):
    monkeypatch.setattr(sys, "argv", ["opensala", "eval", "--suite", entry.split("=")[0], "--data", entry])
    if entry.startswith("rulr"):
        monkeypatch.setattr(sys, "argv", ["opensala", "eval", "--suite", "ruler", "--data", entry])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1 and not out, err
