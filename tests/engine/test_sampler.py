"""Choosing tokens: the distribution is the one asked for, and every option does what it says."""

import pytest
import torch

from opensala.engine import Engine, EngineOptions, SamplingParams
from opensala.engine.sampler import choose, distribution, draw, penalised

from ..conftest import tiny_model
from .test_engine import engine, ids

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


class Request:
    def __init__(self, num_prompt=1, **params):
        self.params, self.num_prompt, self.tokens = SamplingParams(**params), num_prompt, []


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_k": 9}, 5),
        ({"top_p": 0.7}, 2),
        ({"min_p": 0.3}, 2),
        ({"top_p": 1e-9}, 1),
    ],
)
def test_filters_keep_the_most_likely(params, kept):
    probabilities = distribution(LOGITS, SamplingParams(temperature=1.0, **params))
    wanted = torch.zeros(5, dtype=torch.float64)
    wanted[:kept] = LOGITS.double().softmax(-1)[:kept]
    torch.testing.assert_close(probabilities, wanted / wanted.sum())


def test_top_k_is_off_unless_asked():
    probabilities = distribution(torch.zeros(1000), SamplingParams(temperature=1.0))
    assert (probabilities > 0).all()


def test_temperature_divides():
    got = distribution(LOGITS, SamplingParams(temperature=2.0))
    torch.testing.assert_close(got, (LOGITS.double() / 2).softmax(-1))


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"min_p": 0.2}])
def test_draws_follow_the_distribution(params):
    """30,000 draws: every share within five standard errors; what has no probability is never drawn."""
    params = SamplingParams(temperature=1.0, **params)
    probabilities = distribution(LOGITS, params)
    numbers = torch.rand(30_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    counts = torch.bincount(torch.tensor([draw(probabilities, n) for n in numbers]), minlength=5)
    error = 5 * (30_000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 30_000 * probabilities).abs() <= error).all()
    assert draw(probabilities, 1.0) == int(probabilities.nonzero()[-1]) and draw(probabilities, 0.0) == 0


def test_penalties():
    text = [0, 1, 1, 3]  # the first is the prompt's
    got = penalised(LOGITS, Request(presence_penalty=0.5, frequency_penalty=0.25), text)
    torch.testing.assert_close(got, LOGITS - torch.tensor([0.0, 0.5 + 0.5, 0.0, 0.5 + 0.25, 0.0]))
    got = penalised(LOGITS, Request(repetition_penalty=2.0), text)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.5, 0.5, -2.0, -3.0]))
    assert penalised(LOGITS, Request(), text) is LOGITS
    assert choose(LOGITS, Request(repetition_penalty=5.0), text, None) == 2


def test_a_seed_fixes_a_text_whoever_else_is_there():
    model, params = tiny_model(), SamplingParams(max_tokens=20, temperature=1.5, seed=5, ignore_eos=True)
    (alone,) = engine(model).generate([ids(40)], params)
    other = SamplingParams(max_tokens=30, temperature=0.7, seed=6, ignore_eos=True)
    done = engine(model).generate([ids(90, 1), ids(40), ids(40)], [other, params, other])
    assert done[1].tokens == alone.tokens and done[2].tokens != alone.tokens
    before = torch.get_rng_state()
    drawn = SamplingParams(max_tokens=8, temperature=2.0, ignore_eos=True)
    texts = {tuple(engine(model).generate([ids(9)], drawn)[0].tokens) for _ in range(4)}
    # no seed: drawn, and not from the global one
    assert len(texts) > 1 and torch.equal(torch.get_rng_state(), before)


def test_the_most_likely_tokens_are_reported():
    model = tiny_model()
    (done,) = engine(model).generate([ids(30)], SamplingParams(max_tokens=3, logprobs=4, ignore_eos=True))
    for token, logprob, top in zip(done.tokens, done.logprobs, done.top, strict=True):
        assert top[0] == (token, logprob) and len(top) == 4
        assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)


def test_ends_of_text_and_stop_tokens():
    model = tiny_model()
    (free,) = engine(model).generate([ids(30)], SamplingParams(max_tokens=10, ignore_eos=True))
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    (done,) = engine(model).generate(
        [ids(30)], SamplingParams(max_tokens=10, ignore_eos=True, stop_token_ids=(stop,))
    )
    assert done.tokens == free.tokens[: first + 1] and done.finish_reason.value == "stop"
    model.generation_config.eos_token_id = [1, stop]
    (done,) = Engine(model, None, EngineOptions(max_cached_tokens=500)).generate(
        [ids(30)], SamplingParams(max_tokens=10)
    )
    assert done.tokens == free.tokens[: first + 1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 2.0, "whole number"),
        ("max_tokens", True, "whole number"),
        ("temperature", -0.1, "temperature must be 0"),
        ("temperature", float("inf"), "temperature must be 0"),
        ("temperature", float("nan"), "temperature must be 0"),
        ("temperature", 1e-300, "temperature must be 0"),
        ("temperature", "hot", "temperature must be 0"),
        ("top_k", -1, "top_k must be a whole number of at least 0"),
        ("top_p", 0.0, "top_p must be above 0"),
        ("top_p", 1.1, "top_p must be a number above 0"),
        ("min_p", -0.5, "min_p must be a number from 0 to 1"),
        ("min_p", 2, "min_p must be a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty must be above 0"),
        ("presence_penalty", float("nan"), "presence_penalty must be"),
        ("frequency_penalty", 1e9, "frequency_penalty must be"),
        ("seed", -1, "seed must be a whole number"),
        ("seed", 1 << 64, "seed must be below 2"),
        ("logprobs", -1, "logprobs must be a whole number"),
        ("stop", ("",), "stop takes texts of at least one character"),
        ("stop", (3,), "stop takes texts"),
        ("stop_token_ids", (-1,), "stop_token_ids takes token ids"),
        ("score_from", 0, "score_from must be a whole number of at least 1"),
        ("speculate", -2, "speculate must be a whole number"),
    ],
)
def test_parameters_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{field: value})
