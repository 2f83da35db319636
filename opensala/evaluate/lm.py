"""This engine as a model of lm-eval (EleutherAI's lm-evaluation-harness): `model="opensala"`.

Requests go to the engine in groups, ordered so that those with the same beginning stand together: what they
share is read once. lm-eval is imported here and nowhere else in the package.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows

from ..engine import Completion, Engine, EngineOptions, SamplingParams, load_engine
from ..engine.prefill import CHUNK
from ..engine.progress import token_progress

_GROUP = 64  # requests handed to the engine at a time


class OpenSALALM(TemplateLM):
    """A checkpoint as lm-eval sees it.

    Args:
        pretrained: folder or hub name; None for the shipped model. Or an `Engine`.
        batch_size: requests that run together.
        max_length: tokens of a window of `loglikelihood_rolling`, and what longer contexts are cut to from
            the left; None for the length the model was made for.
        max_gen_toks: tokens to generate where a task does not say.
        chunk: tokens computed at a time.
        device, dtype, attention_mode, block_search: as for `load_engine`.
        kv_dtype: as for `EngineOptions`.

    Raises:
        ValueError: a value out of range; see `load_engine` for the checkpoint.
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
        kv_dtype: str = "auto",
        attention_mode: str | None = None,
        block_search: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _positive("batch_size", batch_size)
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        if max_batch_size is not None:
            self.batch_size = min(self.batch_size, _positive("max_batch_size", max_batch_size))
        if not isinstance(pretrained, Engine):
            pretrained = load_engine(
                pretrained,
                device=device or "auto",
                dtype=dtype,
                attention_mode=attention_mode,
                block_search=block_search,
                options=EngineOptions(
                    max_running=self.batch_size,
                    max_batch_tokens=_positive("chunk", chunk),
                    kv_dtype=kv_dtype,
                ),
            )
        self.engine = pretrained
        self.tokenizer = self.engine.tokenizer
        self.max_length = _positive("max_length", max_length or self.engine.config.max_position_embeddings)

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
        total = sum(len(context) + len(wanted) - 1 for context, wanted in pairs)
        with token_progress("loglikelihood", total, disable_tqdm) as advance:
            for group in _groups(sorted(range(len(pairs)), key=lambda i: pairs[i])):
                for i, result in zip(group, self._score([pairs[i] for i in group], advance), strict=True):
                    results[i] = result
                    key = requests[i][0]
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, result)
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
                total += self._score([(context[: len(context) - len(wanted) + 1], wanted)])[0][0]
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        results = [""] * len(requests)
        settings = [self._params(dict(request.args[1])) for request in requests]
        kept = [p[-max(1, self.max_length - s.max_tokens) :] for p, s in zip(prompts, settings, strict=True)]
        with token_progress("generate_until", sum(map(len, kept)), disable_tqdm) as advance:
            for group in _groups(sorted(range(len(requests)), key=lambda i: kept[i])):
                done = self._run([kept[i] for i in group], [settings[i] for i in group], advance)
                for i, completion in zip(group, done, strict=True):
                    results[i] = completion.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, completion.text)
        return results

    # --- how ---

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams], advance: Callable[[int], None] | None
    ) -> list[Completion]:
        return self.engine.generate(prompts, params, on_read=advance)

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], advance: Callable[[int], None] | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation behind its context, and whether each token was the most likely
        one."""
        params = [SamplingParams(max_tokens=0, score_from=len(context)) for context, _ in pairs]
        done = self._run([[*context, *wanted] for context, wanted in pairs], params, advance)
        return [
            (sum(logprob for logprob, _ in c.scores), all(likely for _, likely in c.scores)) for c in done
        ]

    def _params(self, options: dict[str, Any]) -> SamplingParams:
        """What a task asks for; greedy unless it asks for sampling. The text ends before the first stop
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
                f"max_gen_toks, do_sample, temperature, {', '.join(sorted(allowed))}"
            )
        chosen = options if sample else {k: v for k, v in options.items() if k == "repetition_penalty"}
        return SamplingParams(
            max_tokens=tokens, temperature=temperature if sample else 0.0, stop=tuple(until), **chosen
        )


def _groups(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    return (indices[i : i + _GROUP] for i in range(0, len(indices), _GROUP))


def _positive(name: str, value: Any) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)
