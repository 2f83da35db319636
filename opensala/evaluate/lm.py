"""This engine as a model of lm-eval (EleutherAI's lm-evaluation-harness): `model="opensala"`.

Short prompts run in padded batches; prompts longer than a chunk run alone, chunk by chunk, and continuations
of one long context share its reading. lm-eval is imported here and nowhere else in the package.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows
from torch import Tensor

from ..engine import Engine
from ..engine.prefill import CHUNK, prefill
from ..engine.progress import token_progress
from ..model import SALACache

_LOGITS_BYTES = 256 << 20  # of one block of scored positions


class OpenSALALM(TemplateLM):
    """A checkpoint as lm-eval sees it.

    Args:
        pretrained: folder or hub name; None for the shipped model. Or an `Engine`.
        batch_size: short prompts that run together.
        max_length: tokens of a window of `loglikelihood_rolling`, and what longer contexts are cut to from
            the left; None for the length the model was made for.
        max_gen_toks: tokens to generate where a task does not say.
        chunk: tokens of a long prompt read at a time.
        device, dtype, attention_mode, block_search: as for `Engine`.

    Raises:
        ValueError: a value out of range; see `Engine` for the checkpoint.
    """

    def __init__(
        self,
        pretrained: str | Engine | None = None,
        *,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        chunk: int = CHUNK,
        device: str | None = "auto",
        dtype: str = "auto",
        attention_mode: str | None = None,
        block_search: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.engine = (
            pretrained
            if isinstance(pretrained, Engine)
            else Engine(
                pretrained,
                device=device or "auto",
                dtype=dtype,
                attention_mode=attention_mode,
                block_search=block_search,
            )
        )
        self.tokenizer = self.engine.tokenizer
        self.batch_size = _positive("batch_size", batch_size)
        self.max_length = _positive("max_length", max_length or self.engine.config.max_position_embeddings)
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        self.chunk = _positive("chunk", chunk)
        if max_batch_size is not None:
            self.batch_size = min(self.batch_size, _positive("max_batch_size", max_batch_size))

    # --- tokens ---

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.engine.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if (
            add_special_tokens is None
        ):  # a text that already begins with bos (a chat template's) gets no second one
            add_special_tokens = not (
                self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token)
            )
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.engine.name}: the tokenizer has no chat template; run without apply_chat_template"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # --- what lm-eval asks ---

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [
            ((context or [self.prefix_token_id])[-(max(1, self.max_length - len(wanted))) :], wanted)
            for _, context, wanted in requests
        ]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        short = [i for i, (c, w) in enumerate(pairs) if len(c) + len(w) - 1 <= self.chunk]
        long = [i for i, (c, w) in enumerate(pairs) if len(c) + len(w) - 1 > self.chunk]
        with token_progress("loglikelihood", sum(len(c) + len(w) for c, w in pairs), disable_tqdm) as advance:
            for batch in _batches(
                sorted(short, key=lambda i: -len(pairs[i][0]) - len(pairs[i][1])), self.batch_size
            ):
                for i, result in zip(batch, self._score_batch([pairs[i] for i in batch]), strict=True):
                    results[i] = self._remember(requests[i][0], result)
                    advance(len(pairs[i][0]) + len(pairs[i][1]))
            for _, same in groupby(sorted(long, key=lambda i: pairs[i][0]), key=lambda i: pairs[i][0]):
                indices = list(same)
                for i, result in zip(indices, self._score_long([pairs[i] for i in indices]), strict=True):
                    results[i] = self._remember(requests[i][0], result)
                    advance(len(pairs[i][0]) + len(pairs[i][1]))
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = 0.0
            for context, wanted in windows:  # what the window predicts, and the tokens before it
                whole = [*context[: len(context) - len(wanted) + 1], *wanted]
                total += self._score_long([(whole[: len(whole) - len(wanted)], wanted)])[0][0]
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        results = [""] * len(requests)
        settings = [repr(sorted(request.args[1].items(), key=str)) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], -len(prompts[i])))
        with token_progress("generate_until", sum(map(len, prompts)), disable_tqdm) as advance:
            for _, same in groupby(order, key=lambda i: settings[i]):
                indices = list(same)
                long = [[i] for i in indices if len(prompts[i]) > self.chunk]
                for batch in [
                    *long,
                    *_batches([i for i in indices if len(prompts[i]) <= self.chunk], self.batch_size),
                ]:
                    texts = self._generate([prompts[i] for i in batch], dict(requests[batch[0]].args[1]))
                    for i, text in zip(batch, texts, strict=True):
                        results[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                        advance(len(prompts[i]))
        return results

    # --- how ---

    def _remember(self, key: tuple[str, str] | None, result: tuple[float, bool]) -> tuple[float, bool]:
        if key is not None:
            self.cache_hook.add_partial("loglikelihood", key, result)
        return result

    @torch.no_grad()
    def _score_batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One padded call; padding is on the left, so that the continuations end together."""
        rows = [[*context, *wanted][:-1] for context, wanted in pairs]
        ids, mask = self._pad(rows)
        kept = max(len(wanted) for _, wanted in pairs)
        logits = self.engine.model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept
        ).logits
        return [_score(logits[i, kept - len(wanted) :], wanted) for i, (_, wanted) in enumerate(pairs)]

    @torch.no_grad()
    def _score_long(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Continuations of one context, which is read once; the logits of a few hundred positions exist at a
        time."""
        model, context = self.engine.model, pairs[0][0]
        longest = max(len(wanted) for _, wanted in pairs)
        self.engine.check_prompt(len(context) + longest, 0, self.chunk)
        cache = SALACache(self.engine.config)
        modes = model.model._sparse([len(context) + len(wanted) - 1 for _, wanted in pairs])
        shared, read = len(context) > 1 and len(set(modes)) == 1, context[:-1]
        if shared:
            prefill(model, self._ids(read), cache, chunk=self.chunk, following=longest)
            point = cache.snapshot()
        block = max(16, min(self.chunk, _LOGITS_BYTES // (4 * self.engine.config.vocab_size)))
        results = []
        for _, wanted in pairs:
            if shared:
                cache.restore(point)
            else:
                cache.reset()
                if read:
                    prefill(model, self._ids(read), cache, chunk=self.chunk, following=len(wanted))
            total, greedy = 0.0, True
            inputs = [context[-1], *wanted[:-1]]
            cache.begin_prompt([len(inputs)])
            for start in range(0, len(inputs), block):
                part = self._ids(inputs[start : start + block])
                logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
                some, best = _score(logits, wanted[start : start + block])
                total, greedy = total + some, greedy and best
            results.append((total, greedy))
        return results

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Continue prompts; greedy unless the task asks for sampling. The text ends before the first stop
        sequence."""
        given = options.pop("until", None) or []
        until = [stop for stop in ([given] if isinstance(given, str) else given) if stop]
        tokens = int(options.pop("max_gen_toks", options.pop("max_new_tokens", self.max_gen_toks)))
        temperature = float(options.pop("temperature", 0.0) or 0.0)
        sample = bool(options.pop("do_sample", temperature > 0)) and temperature > 0
        allowed = {"top_p", "top_k", "min_p", "repetition_penalty"}
        if unknown := set(options) - allowed:
            raise ValueError(
                f"generation options {sorted(unknown)} are not known here; allowed are until, "
                "max_gen_toks, do_sample, temperature, "
                f"{', '.join(sorted(allowed))}"
            )
        chosen = (
            {"do_sample": True, "temperature": temperature, **options}
            if sample
            else {"do_sample": False, **{k: v for k, v in options.items() if k == "repetition_penalty"}}
        )
        room = max(1, self.max_length - tokens)
        ids, mask = self._pad([p[-room:] for p in prompts])
        self.engine.check_prompt(ids.shape[1] * len(prompts), tokens, self.chunk)
        output = self.engine.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            stop_strings=until or None,
            tokenizer=self.tokenizer,
            prefill_chunk_size=self.chunk,
            pad_token_id=self._pad_id(),
            **chosen,
        )
        texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [min((text.split(stop)[0] for stop in until), key=len, default=text) for text in texts]

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids = [[self._pad_id()] * (width - len(r)) + r for r in rows]
        mask = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
        return torch.tensor(ids, device=self.engine.device), torch.tensor(mask, device=self.engine.device)

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eot_token_id if pad is None else pad

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.engine.device)


def _score(logits: Tensor, wanted: list[int]) -> tuple[float, bool]:
    """Log-probability of `wanted` given logits `[len(wanted), vocab]`, and whether each was the most likely
    token."""
    targets = torch.tensor(wanted, device=logits.device)
    logprobs = torch.log_softmax(logits.float(), -1)
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[i : i + size] for i in range(0, len(indices), size))


def _positive(name: str, value: Any) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)
