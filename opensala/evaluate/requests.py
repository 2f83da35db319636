"""lm-eval's requests with their answers in a file, each on disk before the next begins: a run killed at any
moment resumes there.

lm-eval's own cache (`use_cache`) works too, but writes in a thread of its own, keeps no sampled answers and
does not know the model.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .jsonl import check_fields
from .lm import OpenSALALM
from .provenance import identity


class RequestLog:
    """Answers by request, in the order in which equal requests were answered (a task may ask one thing
    several times).

    It is what lm-eval calls a cache hook: `add_partial` is called with every single answer.

    Args:
        path: a file of JSON lines, made if need be; a last line without its end is cut off.
        whose: who answers, part of every request's key: answers of another model are not taken for this
            one's.

    Raises:
        ValueError: a line that is not an answer.
    """

    def __init__(self, path: Path, whose: str = "") -> None:
        self.path, self.whose = path, whose
        path.parent.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, list[Any]] = defaultdict(list)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
            check_fields(row, {"request": str}, where)
            if "answer" not in row:
                raise ValueError(f"{where}: field 'answer' is missing")
            self.answers[row["request"]].append(row["answer"])

    def __len__(self) -> int:
        return sum(map(len, self.answers.values()))

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        """Write one answer down; it is on disk when this returns."""
        key = self.key_of(kind, arguments)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"request": key, "kind": kind, "answer": answer}, ensure_ascii=False) + "\n"
            )
            file.flush()
            os.fsync(file.fileno())
        self.answers[key].append(answer)

    def key_of(self, kind: str, arguments: Any) -> str:
        """Fingerprint of a request: who is asked, its kind, its texts and its generation options."""
        return hashlib.sha256(
            json.dumps([self.whose, kind, list(arguments)], sort_keys=True, default=str).encode()
        ).hexdigest()[:32]


class ResumingLM(OpenSALALM):
    """The engine as lm-eval's model. With a log it asks itself only what that does not hold yet.

    Args:
        log: file of answers, see `RequestLog`; None keeps none.
        arguments, options: as for `OpenSALALM`.
    """

    def __init__(self, *arguments: Any, log: str | Path | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.log = None
        if log is not None:
            self.log = RequestLog(
                Path(log),
                json.dumps(identity(self.engine, False) | {"longest": self.max_length}, sort_keys=True),
            )
            self.set_cache_hook(self.log)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = self._answered(
            "loglikelihood", requests, lambda rest: super(ResumingLM, self).loglikelihood(rest, disable_tqdm)
        )
        return [(score, greedy) for score, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._answered(
            "loglikelihood_rolling",
            requests,
            lambda rest: super(ResumingLM, self).loglikelihood_rolling(rest, disable_tqdm),
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._answered(
            "generate_until",
            requests,
            lambda rest: super(ResumingLM, self).generate_until(rest, disable_tqdm),
        )

    def _answered(self, kind: str, requests: list[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        if self.log is None:
            return ask(requests)
        held = {key: list(answers) for key, answers in self.log.answers.items()}
        asked: Counter[str] = Counter()
        answers: list[Any] = []
        missing = []
        for i, request in enumerate(requests):
            key = self.log.key_of(kind, request.args)
            known = held.get(key, [])
            answers.append(known[asked[key]] if asked[key] < len(known) else None)
            if asked[key] >= len(known):
                missing.append(i)
            asked[key] += 1
        for i, answer in zip(missing, ask([requests[i] for i in missing]) if missing else [], strict=True):
            answers[i] = answer
        return answers
