"""A tiny model with a tokenizer of its own, engines of it, and texts: what the tests of contexts share."""

import os
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opensala.engine import Document, Engine, EngineOptions, SamplingParams

from ..conftest import tiny_model

DENSE_LEN, PAGE = 64, 16
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
WORDS = "code north gate seven blue otters red falcons near old mill tower by night"


def tokenizer():
    """Characters, and a few merges, so that the end of a text is cut by what follows it."""
    letters = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    merges = [("\n", "\n"), ("t", "h"), ("th", "e"), (".", "\n"), ("e", " ")]
    vocab = {c: i for i, c in enumerate([*letters, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("\n\n", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def model(seed=0, **changes):
    return tiny_model(seed, vocab_size=112, **changes)


def engine(of=None, **changes):
    options = {"max_batch_tokens": 50, "max_running": 4, "max_cached_tokens": 4000, "max_snapshots": 12}
    return Engine(of or model(), tokenizer(), EngineOptions(**{**options, **changes}))


def text(length, seed=0):
    """About so many characters of words."""
    rng, words = random.Random(seed), []
    while sum(map(len, words)) + len(words) < length:
        words.append(rng.choice(WORDS.split()) + rng.choice(["", "", ".\n"]))
    return " ".join(words)[:length]


def documents(length, seed=0, name="book.txt"):
    return [Document(name, text(length, seed))]


def outcome(generation):
    """What must be the same: text, and probabilities bit for bit."""
    return generation.text, generation.confidence, generation.least_confidence, generation.new_tokens


def fork_process():
    """os.fork() with one thread in the child: OpenMP's do not come along, and a call that waits for them
    never ends."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
    return child
