"""Many clients that ask, cancel and vanish at random, and whether the server is afterwards as it was before.

    opensala serve --port 8000 --max-cached-tokens 60000 --forget-after 20
    python scripts/soak_server.py --url http://127.0.0.1:8000 --clients 64 --seconds 300 --rounds 2 --rest 45

Prints how often each outcome came and what /metrics says before and after; the last line on stdout is JSON.
Exit code 1 if something failed but for stated limits (429), if something is still held, or if rounds after
the first one, which fills what the server remembers, leave more memory or open files behind than it did.
"""

import json
import random
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import httpx2
import typer

HELD = ("requests_running", "requests_waiting")
MEMORY, FILES = "resident_memory_bytes", "open_fds"  # of the process; Linux tells them
GAUGES = (*HELD, "pages", "pages_free", "state_slots", "state_slots_free", "snapshots", MEMORY, FILES)
WORDS = ["north", "gate", "barn", "code", "owner", "unit", "mill", "captain", "heron", "nothing", "happened"]


@dataclass(frozen=True)
class Target:
    """The server and how to ask it."""

    url: str
    key: str
    name: str = ""
    patience: float = 120


def main(
    url: str = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(help="API key, if the server has keys.")] = "none",
    clients: int = 64,
    seconds: Annotated[float, typer.Option(help="Of a round, in which it was not suspended.")] = 300,
    seed: int = 0,
    patience: Annotated[
        float, typer.Option(help="Seconds without a byte after which an answer failed.")
    ] = 120,
    rounds: Annotated[int, typer.Option(help="The first fills caches; the others may add nothing.")] = 1,
    rest: Annotated[
        float, typer.Option(help="Seconds without requests behind a round, before it is looked at.")
    ] = 25,
    slack: Annotated[int, typer.Option(help="MiB that the others may add to resident memory.")] = 16,
) -> None:
    """Run the clients and say what became of their requests."""
    http = httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120)
    name = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    target, outcomes = Target(url, key, name, patience), Counter[str]()
    before, began, after = gauges(http), time.monotonic(), []
    for number in range(rounds):
        run_round(target, clients, seconds, seed + number * clients, outcomes)
        after.append(settled(http, rest))
        print(f"round {number + 1}: {after[-1]}", file=sys.stderr)
    bad = [o for o in outcomes if not re.fullmatch(r"(whole|stream|cancelled|vanished) (200|429)", o)]
    held = {gauge: after[-1][gauge] for gauge in HELD if after[-1][gauge]}
    grown = growth(after, slack << 20)
    found = {"outcomes": outcomes, "before": before, "after": after, "failed": bad, "held": held}
    print(json.dumps({**found, "grown": grown, "seconds": round(time.monotonic() - began)}))
    sys.exit(1 if bad or held or grown else 0)


def run_round(target: Target, clients: int, seconds: float, seed: int, outcomes: "Counter[str]") -> None:
    """Let clients go for a while, and wait for the last of them."""
    over = threading.Event()
    threads = [
        threading.Thread(target=client, args=(target, random.Random(seed + n), over, outcomes))
        for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    left, last = seconds, time.monotonic()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        now = time.monotonic()
        before_tick, left = left, left - min(now - last, 2.0)  # more than that is no time that it ran
        last = now
        if left <= 0:
            over.set()
        if before_tick // 10 != left // 10:
            print(f"{max(0.0, left):.0f} s left: {dict(outcomes)}", file=sys.stderr)


def growth(after: list[dict[str, float]], slack: int) -> dict[str, float]:
    """What rounds behind the first one added to memory (more than `slack` bytes) and open files."""
    found = {name: after[-1].get(name, 0) - after[0].get(name, 0) for name in (MEMORY, FILES)}
    return {name: more for name, more in found.items() if more > (slack if name == MEMORY else 0)}


def client(target: Target, rng: random.Random, over: threading.Event, outcomes: "Counter[str]") -> None:
    """One client: whole answers, streams, streams that are cancelled, connections that are dropped."""
    headers = {"authorization": f"Bearer {target.key}"}
    while not over.is_set():
        what = rng.choice(["whole", "stream", "cancelled", "vanished"])
        body: dict[str, Any] = {
            "model": target.name,
            "max_tokens": rng.randint(1, 60),
            "stream": what in ("stream", "cancelled"),
        }
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 1500)))
        body["messages"] = [{"role": "user", "content": f"{text}\n\nWhat is the code?"}]
        wait = rng.uniform(0.01, 1.0) if what == "vanished" else target.patience
        try:
            with (
                httpx2.Client(base_url=target.url, headers=headers, timeout=wait) as http,
                http.stream("POST", "/v1/chat/completions", json=body) as answer,
            ):
                for seen, _ in enumerate(answer.iter_lines()):
                    if what == "cancelled" and seen > body["max_tokens"] // 4:
                        break
                outcomes[f"{what} {answer.status_code}"] += 1
        except httpx2.TimeoutException:
            outcomes["vanished 200" if what == "vanished" else f"{what} timeout"] += 1
        except httpx2.TransportError as error:
            outcomes[f"{what} {type(error).__name__}"] += 1


def gauges(http: httpx2.Client) -> dict[str, float]:
    text = http.get("/metrics").raise_for_status().text
    found = re.findall(r"^(?:opensala|process)_(\w+) ([\d.e+]+)$", text, re.M)
    return {name: float(value) for name, value in found if name in GAUGES}


def settled(http: httpx2.Client, rest: float) -> dict[str, float]:
    """What is held when nothing has run for `rest` seconds, or after a minute more."""
    calm, until = time.monotonic(), time.monotonic() + rest + 60
    while time.monotonic() < min(calm + rest, until):
        time.sleep(0.5)
        if any(gauges(http)[gauge] for gauge in HELD):
            calm = time.monotonic()
    return gauges(http)


if __name__ == "__main__":
    typer.run(main)
