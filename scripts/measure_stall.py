"""What a running stream notices of a long prompt beside it: times between its tokens, idle and meanwhile.

    opensala serve --port 8000 --max-cached-tokens 160000 --max-new-tokens 200000
    python scripts/measure_stall.py --url http://127.0.0.1:8000 --tokens 65000
    python scripts/measure_stall.py --start "python -m opensala serve --port {port}" --tokens 65000

The last form starts the server on a free port, and ends it. It asks any server that has OpenAI's completions:
one stream, and after some seconds one prompt of which one token is wanted. Prints a row as in docs/server.md;
the last line on stdout is JSON. Exit code 1 if the stream or the prompt came to no answer.
"""

import contextlib
import http.client
import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx2
import typer

PATIENCE = 180.0  # seconds that a server may take to start
SENTENCE = "Nothing of note happened that day. "


@dataclass
class Stream:
    """When its tokens came, and when it was over, in seconds of one clock."""

    stamps: list[float] = field(default_factory=list)
    ended: float | None = None
    failed: str | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, url: str, body: dict[str, Any]) -> None:
        """Take events until the server ends them, or `stop` is set."""
        # The plainest client there is: a stream of a thousand tokens a second keeps others busy.
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
        headers = {"content-type": "application/json"}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                self.failed = answer.read().decode()[:300]
            while not self.stop.is_set() and (piece := answer.read1(1 << 16)):
                self.stamps += [time.perf_counter()] * piece.count(b"data: {")
        except (OSError, http.client.HTTPException) as error:  # cut off in the middle counts as an end
            self.failed = f"{type(error).__name__}: {error}"
        finally:
            self.ended = time.perf_counter()
            connection.close()

    def between(self, start: float, end: float) -> dict[str, Any] | None:
        """Milliseconds between the tokens of a span; None for too few."""
        stamps = [stamp for stamp in self.stamps if start <= stamp <= end]
        times = sorted(1e3 * (b - a) for a, b in zip(stamps, stamps[1:], strict=False))
        if len(times) < 20:
            return None
        at = {name: round(times[int(len(times) * share)], 2) for name, share in (("p50", 0.5), ("p95", 0.95))}
        return {**at, "longest": round(times[-1], 1), "tokens": len(stamps)}


@contextlib.contextmanager
def started(command: str) -> Iterator[str]:
    """A server of this command line, `{port}` in it, while the block runs; its URL. Exits if it does not
    answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in shlex.split(command)]
    server = subprocess.Popen(words, stdout=sys.stderr)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/v1/models", timeout=5).status_code == 200:
                    break
            if server.poll() is not None or time.monotonic() > end:
                sys.exit(f"nothing answers at {url}: {shlex.join(words)} (exit code {server.returncode})")
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def main(
    url: str = "http://127.0.0.1:8000",
    start: Annotated[str, typer.Option(help="Command that starts the server, with {port} in it.")] = "",
    tokens: Annotated[int, typer.Option(help="Of the prompt, about.")] = 65_000,
    stream_tokens: Annotated[int, typer.Option(help="Of the stream, at most.")] = 200_000,
    idle: Annotated[float, typer.Option(help="Seconds before the prompt comes.")] = 4,
    begin: Annotated[str, typer.Option(help="The stream's prompt.")] = "import os",
    ignore_eos: Annotated[bool, typer.Option(help="The stream goes on behind its end.")] = True,
    name: Annotated[str, typer.Option(help="What to call the row.")] = "server",
) -> None:
    """Measure and print a row."""
    with started(start) if start else contextlib.nullcontext(url) as at:
        found = measure(at, tokens, stream_tokens, idle, begin, ignore_eos)
    found["name"] = name
    print(row(found))
    print(json.dumps(found | {"rows": rows_of(found)}))
    sys.exit(0 if found["prompt"]["status"] == 200 and found["idle"] else 1)


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of the table."""
    spans = {when: found[when] for when in ("idle", "meanwhile") if found[when]}
    rows = [
        {"what": f"between tokens, {when}", "p50": s["p50"], "p95": s["p95"]} for when, s in spans.items()
    ]
    if len(spans) == 2:
        rows.append(
            {"what": "times at p95", "times": round(spans["meanwhile"]["p95"] / spans["idle"]["p95"], 2)}
        )
    return [*rows, {"what": "prompt", "seconds": found["prompt"]["seconds"]}]


def measure(
    url: str, tokens: int, stream_tokens: int, idle: float, begin: str, ignore_eos: bool
) -> dict[str, Any]:
    """A stream alone, and beside a prompt."""
    model = httpx2.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"][0]["id"]
    body = {"model": model, "prompt": f"{begin}\n", "max_tokens": stream_tokens, "stream": True}
    body |= {"temperature": 0} | ({"ignore_eos": True} if ignore_eos else {})
    sentence = complete(url, model, 100).raise_for_status().json()["usage"]["prompt_tokens"] / 100
    stream = Stream()
    thread = threading.Thread(target=stream.run, args=(url, body), daemon=True)
    thread.start()
    while len(stream.stamps) < 20:
        time.sleep(0.01)
        if stream.ended is not None:
            sys.exit(f"the stream ended at once: {stream.failed or 'no tokens'}")
    began = time.perf_counter()
    time.sleep(idle)
    came = time.perf_counter()
    answer = complete(url, model, int(tokens / sentence))
    over = time.perf_counter()
    ended = None if stream.ended is None else round(stream.ended - came, 2)
    stream.stop.set()
    prompt = {"status": answer.status_code, "seconds": round(over - came, 1)}
    if answer.status_code == 200:
        prompt["tokens"] = answer.json()["usage"]["prompt_tokens"]
    return {
        "idle": stream.between(began, came),
        "meanwhile": stream.between(came, over),
        "stream_ended": ended,
        "prompt": prompt,
    }


def complete(url: str, model: str, sentences: int) -> httpx2.Response:
    """One token behind so many sentences, which begin as no prompt did before: nothing of it is at hand."""
    text = f"Record {time.time_ns()}. " + SENTENCE * sentences
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0}
    return httpx2.post(f"{url}/v1/completions", json=body, timeout=300)


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    idle, meanwhile, took = found["idle"], found["meanwhile"], found["prompt"]["seconds"]
    spans = [f"{s['p50']}, {s['p95']} ms" if s else "too few" for s in (idle, meanwhile)]
    times = f"{meanwhile['p95'] / idle['p95']:.1f}" if idle and meanwhile else ""
    if found["stream_ended"] is not None:
        spans[1] += f" (the stream was over after {found['stream_ended']} s)"
    return f"| {found['name']} | {spans[0]} | {spans[1]} | {times} | {took} s |"


if __name__ == "__main__":
    typer.run(main)
