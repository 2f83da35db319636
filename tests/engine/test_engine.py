"""The engine gives every request, bit for bit, what the model alone would give it: the equality chain.

One-shot == in chunks == token by token == with others coming and going == put back and resumed == behind a
prefix that was read before == with drafts. Token ids and log-probabilities are compared with `==`.
"""

import random
from array import array

import pytest
import torch

from opensala import SALACache
from opensala.engine import Engine, EngineOptions, FinishReason, SamplingParams, load_engine
from opensala.ops import likeliest

from ..conftest import tiny_model

SMALL = EngineOptions(max_batch_tokens=50, max_running=4, max_cached_tokens=2000, max_snapshots=8)
DENSE_LEN, BLOCK, WINDOW = 64, 16, 32


def ids(length, seed=0, low=3, high=97):
    rng = random.Random(seed)
    return [rng.randrange(low, high) for _ in range(length)]


def engine(model=None, **changes):
    options = {**SMALL.__dict__, **changes}
    return Engine(model or tiny_model(), None, EngineOptions(**options))


@torch.no_grad()
def by_hand(model, prompt, count):
    """Greedy tokens and their log-probabilities by `forward` alone: the prompt in one call, then token by
    token."""
    cache, tokens, logprobs = SALACache(model.config), [], []
    cache.begin_prompt([len(prompt)])
    logits = model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]
    for _ in range(count):
        (best,) = likeliest(logits[None])
        tokens.append(best.token)
        logprobs.append(best.highest - best.lse)
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1]
    return tokens, logprobs


def same(completion, wanted):
    return completion.tokens == wanted[0] and completion.logprobs == wanted[1]


EDGES = sorted(
    {n + d for n in (DENSE_LEN, 2 * BLOCK, WINDOW + 5 * BLOCK, 200) for d in (-1, 0, 1)} | {1, 2, BLOCK}
)


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize("batch", [1, 7, BLOCK, 50, 1000])
def test_engine_equals_the_model(length, batch):
    """Around `dense_len`, blocks (pages), and the length from which selection leaves blocks out; in any
    chunks."""
    model, prompt = tiny_model(), ids(length)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    running = engine(model, max_batch_tokens=batch)
    (done,) = running.generate([prompt], params)
    assert same(done, by_hand(model, prompt, 20))
    assert done.finish_reason is FinishReason.LENGTH
    running.check_integrity()


@pytest.fixture(scope="module")
def shipped():
    return load_engine(options=EngineOptions(max_cached_tokens=40_000, max_batch_tokens=1500)).model


@pytest.mark.parametrize("length", [4095, 4096, 4097])
def test_the_shipped_model_around_its_dense_len(shipped, length):
    """Three sequences together, with drafts; the answer crosses dense_len where the prompt does not reach
    it."""
    prompts = [ids(length, seed, high=2000) for seed in range(2)] + [ids(20, high=2000) * 205]
    prompts[2] = prompts[2][:length]
    options = EngineOptions(max_cached_tokens=30_000, max_batch_tokens=1500, speculate=4)
    together = Engine(shipped, None, options)
    done = together.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    for prompt, completion in zip(prompts, done, strict=True):
        assert same(completion, by_hand(shipped, prompt, 6))
    together.check_integrity()


def play(running, requests, seed, speculate=0):
    """Requests arrive at random steps; returns their completions and how often one was put back."""
    rng, waiting, done, preemptions = random.Random(seed), list(requests), {}, 0
    while waiting or running.has_work:
        while waiting and (not running.has_work or rng.random() < 0.4):
            name, prompt, params = waiting.pop(0)
            running.add(prompt, params, request_id=name)
        for sequence in running.scheduler.sequences():
            preemptions = max(preemptions, sequence.preemptions)
        for event in running.step():
            if event.completion is not None:
                done[event.request_id] = event.completion
        running.check_integrity()
    return done, preemptions


@pytest.mark.parametrize("speculate", [0, 5])
@pytest.mark.parametrize("cached", [2000, 400])
def test_eight_sequences_coming_and_going(cached, speculate):
    """With plenty of memory, and with so little that sequences are put back and read again."""
    model, rng = tiny_model(), random.Random(3)
    lengths = [1, 30, DENSE_LEN - 10, DENSE_LEN - 1, DENSE_LEN, 150, 230, 90]
    requests = []
    for n, length in enumerate(lengths):
        prompt = ids(length, n) if n % 2 else (ids(7, n) * 40)[:length]  # some repeat themselves: drafts hit
        requests.append((f"r{n}", prompt, SamplingParams(max_tokens=rng.randint(5, 40), ignore_eos=True)))
    running = engine(model, max_cached_tokens=cached, max_running=8, speculate=speculate)
    done, preemptions = play(running, requests, seed=1)
    for name, prompt, params in requests:
        assert same(done[name], by_hand(model, prompt, params.max_tokens)), name
    assert (preemptions > 0) == (cached == 400)
    if speculate:
        assert sum(c.accepted for c in done.values()) > 0
        assert sum(c.drafted - c.accepted for c in done.values()) > 0  # some were rolled back


@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
def test_drafts_change_no_token(temperature):
    """Greedy or sampled: the text is that without drafts, and drafts are accepted and refused on the way."""
    model = tiny_model()
    prompts = [(ids(9, seed) * 30)[:n] for seed, n in enumerate((40, 60, 120, 200))]
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=7, ignore_eos=True)
    plain = engine(model).generate(prompts, params)
    guessed = engine(model, speculate=6).generate(prompts, params)
    assert [c.tokens for c in plain] == [c.tokens for c in guessed]
    assert [c.logprobs for c in plain] == [c.logprobs for c in guessed]
    assert sum(c.drafted for c in guessed) > sum(c.accepted for c in guessed)


def test_a_number_of_threads_changes_no_bit():
    model, prompts, threads = tiny_model(), [ids(200), ids(90, 1)], torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append([(c.tokens, c.logprobs) for c in engine(model).generate(prompts)])
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


# --- prefixes ---


def test_a_document_is_read_once():
    model, document = tiny_model(), ids(400)
    running = engine(model, max_snapshots=30)
    prompts = [document + ids(20, seed) for seed in range(1, 6)]
    done = running.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    for prompt, completion in zip(prompts, done, strict=True):
        assert same(completion, by_hand(model, prompt, 5))
    assert [c.reuse.reused for c in done] == [0, 400, 400, 400, 400]
    assert [c.reuse.computed for c in done] == [420, 20, 20, 20, 20]
    assert done[0].reuse.why == "this text was not read before, or is no longer at hand"


def test_a_mark_serves_later_requests():
    """At a place that no page ends at; the page is copied, not written to by two."""
    model, document = tiny_model(), ids(203)
    running, params = engine(model), SamplingParams(max_tokens=8, ignore_eos=True)
    running.generate([document + ids(10, 1)], params, marks=[[203]])
    for seed in (2, 3, 1):
        prompt = document + ids(10, seed)
        (done,) = running.generate([prompt], params)
        assert same(done, by_hand(model, prompt, 8)) and done.reuse.reused >= 203
        running.check_integrity()


def test_a_conversation_goes_on_where_it_ended():
    model = tiny_model()
    running, params, text = engine(model), SamplingParams(max_tokens=9, ignore_eos=True), ids(100)
    for turn in range(3):
        (done,) = running.generate([text], params)
        assert same(done, by_hand(model, text, 9))
        assert done.reuse.reused == (0 if not turn else len(text) - 8)  # its last token, and seven new ones
        text = text + done.tokens + ids(7, turn + 1)


def test_a_turn_that_crosses_dense_len_is_read_anew():
    """A fresh run would read all of it sparsely: what was read densely is not taken for that."""
    model = tiny_model(sparse_config={**tiny_model().config.sparse_config, "dense_len": 150, "topk": 2})
    running, params = engine(model), SamplingParams(max_tokens=4, ignore_eos=True)
    running.generate([ids(140)], params, marks=[[140]])
    for length in (145, 149, 150, 160):
        (done,) = running.generate([ids(140) + ids(length - 140, 5)], params)
        assert same(done, by_hand(model, ids(140) + ids(length - 140, 5), 4))
        assert done.reuse.reused == (140 if length < 150 else 0)


def test_pages_without_states_are_read_again_and_said():
    model, document = tiny_model(), ids(300)
    running, params = engine(model, max_snapshots=8), SamplingParams(max_tokens=2, ignore_eos=True)
    running.generate([document], params)
    prompt = document[:250] + ids(30, 9)
    (done,) = running.generate([prompt], params)
    assert done.reuse.reused == 0 and "240 tokens were at hand as keys and values" in done.reuse.why
    assert same(done, by_hand(model, prompt, 2))
    (again,) = running.generate([document[:250] + ids(30, 10)], params)
    assert again.reuse.reused == 240  # where texts parted, a snapshot was kept


def test_prompts_that_begin_alike_are_not_confused():
    model = tiny_model()
    running, params = engine(model), SamplingParams(max_tokens=6, ignore_eos=True)
    base = ids(160)
    for place in (159, 100, 80, 16, 0):
        prompt = list(base)
        prompt[place] = 3 + (prompt[place] + 1) % 90
        for text in (base, prompt):
            (done,) = running.generate([text], params)
            assert same(done, by_hand(model, text, 6))
    running.check_integrity()


# --- coming and going ---


def test_two_hundred_aborted_requests_leave_nothing():
    running, rng = engine(max_running=6), random.Random(0)
    for n in range(200):
        running.add(
            ids(rng.randint(1, 300), n), SamplingParams(max_tokens=rng.randint(1, 50)), request_id=str(n)
        )
        if rng.random() < 0.7:
            running.step()
        for name in [str(m) for m in range(n + 1) if rng.random() < 0.3 and str(m) in running._requests]:
            event = running.abort(name)
            assert event.finish_reason is FinishReason.ABORT
            running.check_integrity()
    for name in list(running._requests):
        running.abort(name)
    running.check_integrity()
    running.scheduler.tree.clear()
    for pool in (running.scheduler.pages, running.scheduler.slots):
        assert pool.num_free == pool.size
    assert not running.has_work and running.num_requests == 0
    with pytest.raises(ValueError, match="no request 'nobody' is running or waiting"):
        running.abort("nobody")
    with pytest.raises(ValueError, match="no request '3' is running"):
        running.abort("3")


def test_an_interrupted_step_changes_nothing():
    model = tiny_model()
    running, params = engine(model), SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    (wanted,) = engine(model).generate([ids(180)], params)
    running.add(ids(180), params)

    def interrupt(*_):
        raise KeyboardInterrupt

    last = None
    for step in range(40):
        if not running.has_work:
            break
        handle = model.model.layers[step % 4].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            running.step()
        handle.remove()
        running.check_integrity()
        for event in running.step():
            last = event.completion or last
    assert last.tokens == wanted.tokens and last.logprobs == wanted.logprobs


def test_an_interrupted_generate_leaves_the_engine_free():
    running, seen = engine(), []

    def stop(event):
        seen.append(event)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.generate([ids(100), ids(20)], on_event=stop)
    assert seen and not running.has_work
    running.check_integrity()
    assert running.generate([ids(30)])[0].tokens


def test_a_listener_that_goes_away_frees_its_request():
    running = engine()
    stream = running.stream(ids(100), SamplingParams(max_tokens=30, ignore_eos=True))
    next(stream), next(stream)
    stream.close()
    assert not running.has_work
    running.check_integrity()


def test_poisoned_memory_changes_nothing():
    """What nobody wrote is never read: pages and slots full of NaN give the same bits."""
    model = tiny_model()
    running = engine(model, max_cached_tokens=600)
    for pool in running.storage.kv.values():
        for tensor in pool:
            tensor.fill_(float("nan"))
    for states in running.storage.states.values():
        states.fill_(float("nan"))
    prompts = [ids(200), ids(30, 1), ids(130, 2)]
    done = running.generate(prompts, SamplingParams(max_tokens=10, ignore_eos=True))
    for prompt, completion in zip(prompts, done, strict=True):
        assert same(completion, by_hand(model, prompt, 10))


# --- scoring ---


@pytest.mark.parametrize("length", [2, 50, 170])
def test_scores_are_those_of_the_model(length):
    model, text = tiny_model(), ids(length)
    with torch.no_grad():
        logits = model(torch.tensor([text[:-1]]), use_cache=False).logits[0]
    rows = likeliest(logits)
    logprobs = [float(x[token]) - row.lse for x, token, row in zip(logits, text[1:], rows, strict=True)]
    likely = [row.token == token for row, token in zip(rows, text[1:], strict=True)]
    for start in {1, length // 2, length - 1} - {0}:
        (done,) = engine(model).generate([text], SamplingParams(max_tokens=0, score_from=start))
        assert done.scores == list(zip(logprobs[start - 1 :], likely[start - 1 :], strict=True))
        assert done.tokens == [] and done.finish_reason is FinishReason.LENGTH


def test_scores_of_a_text_that_was_read_before_and_put_back():
    model, text = tiny_model(), ids(170)
    (wanted,) = engine(model).generate([text], SamplingParams(max_tokens=0, score_from=3))
    running = engine(model, max_cached_tokens=400, max_batch_tokens=20)
    running.generate([text], SamplingParams(max_tokens=2), marks=[[100]])
    running.add(ids(150, 1), SamplingParams(max_tokens=200, ignore_eos=True), request_id="long")
    running.add(text, SamplingParams(max_tokens=0, score_from=3), request_id="scored")
    done = {}
    while running.has_work:
        done |= {e.request_id: e.completion for e in running.step() if e.completion is not None}
    assert done["scored"].scores == wanted.scores and len(wanted.scores) == 167


# --- bad input ---


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], None, "the prompt is empty"),
        ([3, 97], None, "token ids must lie between 0 and 96, got 97"),
        ([3, -1], None, "token ids must lie between 0 and 96, got -1"),
        ("text", None, "a prompt is a sequence of token ids, got str"),
        ([3] * 2001, None, "need .* bytes of cache on cpu, the engine has"),
        ([3] * 1990, SamplingParams(max_tokens=40), "shorten the document"),
        ([3] * 5, SamplingParams(stop=("x",)), "stop texts need a tokenizer"),
        (
            [3] * 5,
            SamplingParams(max_tokens=0, score_from=5),
            "score_from must be below the prompt's 5 tokens",
        ),
        (
            [3] * 5,
            SamplingParams(max_tokens=2, score_from=2),
            "scores its prompt .* or continues it, not both",
        ),
        ([3] * 5, SamplingParams(logprobs=98), "logprobs must be at most 97"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(prompt, params, message):
    running = engine()
    with pytest.raises(ValueError, match=message):
        running.add(prompt, params)
    assert not running.has_work and running.num_requests == 0


def test_ids_and_marks_are_checked():
    running = engine()
    running.add([3, 4], request_id="a")
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        running.add([3, 4], request_id="a")
    with pytest.raises(ValueError, match="marks must lie within the prompt, 1 to 2, got 3"):
        running.add([3, 4], marks=[3])
    with pytest.raises(ValueError, match="1 other requests are under way"):
        running.generate([[3]])


def test_engines_that_hold_nothing_are_refused():
    with pytest.raises(ValueError, match="which hold none"):
        engine(memory_bytes=10, max_cached_tokens=None)
    for field, value in (("max_running", 0), ("max_batch_tokens", 1.5), ("snapshot_interval", -1)):
        with pytest.raises(ValueError, match=f"{field} must be a whole number"):
            EngineOptions(**{field: value})


@pytest.mark.parametrize("place", ["embeddings", "head"])
def test_damaged_weights_are_an_error_and_not_an_answer(place):
    model = tiny_model()
    weight = model.model.embed_tokens.weight if place == "embeddings" else model.lm_head.weight
    with torch.no_grad():
        weight[50] = float("nan")
    running = engine(model)
    with pytest.raises(ValueError, match="is not finite"):
        running.generate([[50, 3, 4]])
    with pytest.raises(ValueError, match="is not finite"):
        running.generate([[50, 3, 4]], SamplingParams(max_tokens=0, score_from=1))
    assert not running.has_work
    running.check_integrity()


def test_damage_in_one_text_is_no_harm_to_another():
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    running, wanted = engine(model), by_hand(model, [5, 6, 7], 6)
    running.add([50, 3], request_id="bad")
    running.add([5, 6, 7], SamplingParams(max_tokens=6, ignore_eos=True), request_id="good")
    ends = {}
    while running.has_work:
        ends |= {e.request_id: e.completion for e in running.step() if e.completion is not None}
    assert ends["bad"].finish_reason is FinishReason.ERROR and "not finite" in ends["bad"].error
    assert same(ends["good"], wanted)


def test_a_sequence_keeps_integers():
    running = engine()
    running.add(ids(5))
    (sequence,) = running.scheduler.sequences()
    assert isinstance(sequence.tokens, array) and isinstance(sequence.pages, array)


def test_namespaces_share_nothing():
    """Neither after the fact nor while both read: what one key sent must not show in another's account."""
    model, text = tiny_model(), ids(400)
    running, params = engine(model), SamplingParams(max_tokens=4, ignore_eos=True)
    for name in ("a", "b"):
        running.add([*text, 5], params, request_id=f"{name}1", marks=[300], namespace=name)
    assert [s.marks for s in running.scheduler.waiting] == [[300], [300]]  # none where the two part
    ends = {}

    def finish():
        while running.has_work:
            ends.update({e.request_id: e.completion for e in running.step() if e.completion is not None})
            running.check_integrity()

    finish()
    for name in ("a", "c"):
        running.add([*text, 6], params, request_id=f"{name}2", namespace=name)
    finish()
    assert [ends[i].reuse.reused for i in ("a1", "b1", "a2", "c2")] == [0, 0, 300, 0]
    assert (
        ends["c2"].reuse.why
        == ends["b1"].reuse.why
        == "this text was not read before, or is no longer at hand"
    )
    assert same(ends["a2"], by_hand(model, [*text, 6], 4))
