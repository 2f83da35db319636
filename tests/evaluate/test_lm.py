"""This engine as a model of lm-eval: the figures of a plain forward pass, and a whole run offline on a local
task."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from opensala.engine import load_engine
from opensala.evaluate import register_with_lm_eval
from tests.lm_eval_tasks import answer_task, choice_task, head

pytest.importorskip("lm_eval")

TASKS = choice_task("tiny_choice", "choice.jsonl")
GENERATION = answer_task("tiny_generation", "choice.jsonl", "choices[label]", 12)
PERPLEXITY = (
    head("tiny_perplexity", "choice.jsonl")
    + """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""
)
PROGRAM = """
import json, sys
import opensala
assert not any(name.split(".")[0] == "lm_eval" for name in sys.modules)
import lm_eval
from opensala.evaluate import register_with_lm_eval
register_with_lm_eval()
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
tasks = ["tiny_choice", "tiny_generation", "tiny_perplexity"]
out = lm_eval.simple_evaluate(model="opensala", model_args={"chunk": 64}, tasks=tasks,
                              task_manager=manager, batch_size=4, bootstrap_iters=0)
results = {k: {m: v for m, v in r.items() if isinstance(v, float)} for k, r in out["results"].items()}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def engine():
    return load_engine()


@pytest.fixture
def lm(engine):
    from opensala.evaluate.lm import OpenSALALM

    return OpenSALALM(engine, batch_size=3)


def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


def plain(engine, context, wanted):
    with torch.no_grad():
        logits = torch.log_softmax(
            engine.model(torch.tensor([[*context, *wanted][:-1]]), use_cache=False).logits[0].float(), -1
        )[-len(wanted) :]
    return float(logits.gather(1, torch.tensor(wanted)[:, None]).sum()), logits.argmax(-1).tolist() == wanted


PAIRS = [
    ("def read_file(path):", "\n    return"),
    (
        "The access code for blue-falcon is 48213.\n\nQuestion: What is the access code for "
        "blue-falcon?\nAnswer:",
        " 48213",
    ),
    ("x", " y z and more of it"),
    ("import os\n" * 60 + "import", " sys"),
    ("", "import"),
]


@pytest.mark.parametrize("chunk", [4096, 32])
def test_loglikelihood_is_that_of_a_plain_forward_pass(engine, chunk):
    """Batched with padding, and chunk by chunk."""
    from opensala.evaluate.lm import OpenSALALM

    lm = OpenSALALM(engine, batch_size=3, chunk=chunk)
    found = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
        ids = engine.tokenizer(context)["input_ids"]
        wanted = engine.tokenizer(context + continuation)["input_ids"][len(ids) :]
        expected = plain(engine, ids, wanted)
        assert score == pytest.approx(expected[0], abs=2e-3) and greedy == expected[1], continuation
    assert found[1][1]  # the fact is found


def test_continuations_of_a_long_context_share_its_reading(engine, monkeypatch):
    from opensala.evaluate.lm import OpenSALALM

    lm, done = OpenSALALM(engine, chunk=32), []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *a, **k: done.append(generate(*a, **k)) or done[-1])
    context = "import os\nimport sys\n" * 30
    found = lm.loglikelihood(
        requests((context, "import os"), (context, "import sys"), (context, "return")), disable_tqdm=True
    )
    computed = sorted(c.reuse.computed for c in done[0])
    assert computed[0] < 10 and computed[1] < 10 and computed[2] > 100 and found[0][0] > found[2][0]


def test_rolling(engine, lm):
    text = "import os\nimport sys\n\n\ndef main():\n    return os.path.join(sys.argv)\n" * 3
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    (found,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert found == pytest.approx(plain(engine, [engine.tokenizer.bos_token_id], ids)[0], abs=5e-3)
    lm.max_length = 20  # windows: every token is predicted once
    (windows,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert windows < found


def test_generation(engine, lm):
    """Batched, padded and chunked prompts give what each gives alone; stop sequences end the text and are
    left out."""
    from opensala.evaluate.lm import OpenSALALM

    facts = [
        "The access code for blue-falcon is 48213.",
        "The access code for red-oak is 7719.",
        "The access code for old-mill is 902.",
    ]
    prompts = [
        f"{'Nothing happened. ' * n}{fact}\n\nQuestion: What is {fact[4 : fact.index(' is')]}?\nAnswer:"
        for n, fact in enumerate(facts)
    ]
    prompts[2] = prompts[2].replace("What is access", "What is the access")
    options = {"until": ["\n", "Question"], "max_gen_toks": 10}
    alone = [OpenSALALM(engine).generate_until(requests((p, options)), disable_tqdm=True)[0] for p in prompts]
    assert lm.generate_until(requests(*((p, options) for p in prompts)), disable_tqdm=True) == alone
    assert (
        OpenSALALM(engine, chunk=16).generate_until(
            requests(*((p, options) for p in prompts)), disable_tqdm=True
        )
        == alone
    )
    assert "48213" in alone[0] and options == {"until": ["\n", "Question"], "max_gen_toks": 10}
    (cut,) = lm.generate_until(
        requests((prompts[0], {"until": ["2"], "max_gen_toks": 10})), disable_tqdm=True
    )
    assert "2" not in cut and alone[0].startswith(cut)
    with pytest.raises(ValueError, match=r"\['beams'\] are not known here; allowed are until"):
        lm.generate_until(requests(("a", {"beams": 3})), disable_tqdm=True)


def test_bad_values(engine):
    from opensala.evaluate.lm import OpenSALALM

    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 'auto'"):
        OpenSALALM(engine, batch_size="auto")


def test_lm_eval_knows_the_model():
    from lm_eval.api.registry import model_registry

    register_with_lm_eval()
    register_with_lm_eval()
    assert model_registry._objs["opensala"] == "opensala.evaluate.requests:ResumingLM"


def test_without_lm_eval_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises((ValueError, ModuleNotFoundError), match="lm.eval"):
        register_with_lm_eval()


def test_a_whole_run_offline(tmp_path):
    """lm-eval finds the model by its name, in a fresh process, with a task of three output types and no
    network."""
    docs = []
    for n, name in enumerate(("blue-falcon", "red-oak", "old-mill", "tall-ship")):
        code = str(48213 + 911 * n)
        docs.append(
            {
                "text": "Nothing of note happened. " * 12
                + f"The access code for {name} is {code}. "
                + "The day went by. " * 5,
                "question": f"What is the access code for {name}?",
                "choices": ["11111", code, "99999"],
                "label": 1,
            }
        )
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    for name, text in (("choice", TASKS), ("generation", GENERATION), ("perplexity", PERPLEXITY)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    import os

    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["tiny_choice"]["acc,none"] == 1.0
    assert results["tiny_generation"]["exact_match,none"] >= 0.5
    assert 1 < results["tiny_perplexity"]["word_perplexity,none"] < 1e9
