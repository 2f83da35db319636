"""Two replicas behind nginx on shared contexts, one of them killed under load: what is lost.

    python scripts/replicas.py --seconds 30

It starts two `opensala serve` with the same folder of contexts and nginx in front (with the configuration in
docs/scaling.md), uploads contexts, lets clients ask about them, whole and streamed, kills one replica with
SIGKILL after a third of the time, and starts it again after two thirds. The last line on stdout is JSON. Exit
code 1 if anything but a stream of the killed replica was lost, or if a context is gone.
"""

import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import typer

ROOT = Path(__file__).parents[1]
FILLER = "Nothing of note happened that day.\n" * 60


@dataclass
class Load:
    """What clients ask, and what became of it."""

    url: str
    contexts: dict[str, str]  # id: the code that its document has
    model: str
    outcomes: "Counter[str]" = field(default_factory=Counter)
    by_replica: "Counter[str]" = field(default_factory=Counter)
    until: float = 0.0


def main(
    seconds: float = 30, clients: int = 6, contexts: int = 4, seed: int = 0, nginx: str = "nginx"
) -> None:
    """Run the replicas, the balancer and the clients."""
    if shutil.which(nginx) is None:
        raise typer.BadParameter(f"{nginx} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        ports = _free_ports(3)
        replicas = [_replica(port, folder) for port in ports[:2]]
        balancer = _balancer(nginx, Path(folder), ports)
        try:
            for port in ports:
                _wait(f"http://127.0.0.1:{port}/health")
            found = _under_load(
                f"http://127.0.0.1:{ports[2]}", replicas, ports, folder, seconds, clients, contexts, seed
            )
        finally:
            for process in (*replicas, balancer):
                process.terminate()
                process.wait(30)
    print(json.dumps(found))
    sys.exit(1 if found["lost"] or found["contexts_lost"] else 0)


def _under_load(
    url: str,
    replicas: "list[subprocess.Popen[bytes]]",
    ports: list[int],
    folder: str,
    seconds: float,
    clients: int,
    count: int,
    seed: int,
) -> dict[str, Any]:
    http = httpx2.Client(base_url=url, timeout=60)
    model = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    rng = random.Random(seed)
    codes = [str(rng.randint(10_000, 99_999)) for _ in range(count)]
    made = {_upload(http, model, code): code for code in codes}
    load = Load(url, made, model, until=time.monotonic() + seconds)
    threads = [threading.Thread(target=_client, args=(load, random.Random(seed + n))) for n in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    replicas[0].kill()
    replicas[0].wait()
    print("one replica was killed", file=sys.stderr)
    time.sleep(seconds / 3)
    replicas[0] = _replica(ports[0], folder)
    for thread in threads:
        thread.join()
    lost = {
        name: n
        for name, n in load.outcomes.items()
        if not re.fullmatch(r"(whole|stream) right|stream cut", name)
    }
    gone = [i for i, code in made.items() if _ask(http, load, i).get("text", "") != code]
    used = {name.removeprefix("127.0.0.1:"): n for name, n in load.by_replica.items()}
    rows = [{"what": "answers", "count": sum(n for name, n in load.outcomes.items() if "right" in name)}]
    found = {"outcomes": load.outcomes, "answers_by_port": used, "lost": lost, "contexts_lost": gone}
    return found | {"rows": rows}


def _upload(http: httpx2.Client, model: str, code: str) -> str:
    text = f"{FILLER}The access code for the north gate is {code}.\n{FILLER}"
    body = {"model": model, "documents": [{"text": text}]}
    return http.post("/v1/contexts", json=body).raise_for_status().json()["id"]


def _client(load: Load, rng: random.Random) -> None:
    """Ask about contexts until the time is over."""
    http = httpx2.Client(base_url=load.url, timeout=60)
    while time.monotonic() < load.until:
        context, stream = rng.choice(sorted(load.contexts)), rng.random() < 0.5
        kind = "stream" if stream else "whole"
        try:
            answer = _ask(http, load, context, stream)
        except httpx2.TransportError as error:
            load.outcomes[f"{kind} cut" if stream else f"{kind} {type(error).__name__}"] += 1
            continue
        load.by_replica[answer["replica"]] += 1
        said = "right" if answer["text"] == load.contexts[context] else f"wrong {answer['status']}"
        load.outcomes[f"{kind} {said}"] += 1


def _ask(http: httpx2.Client, load: Load, context: str, stream: bool = False) -> dict[str, Any]:
    """The answer to a question about a context, and which replica gave it."""
    question = [{"role": "user", "content": "What is the access code for the north gate?"}]
    body = {"model": load.model, "messages": question, "context": context, "stream": stream, "max_tokens": 30}
    with http.stream("POST", "/v1/chat/completions", json=body, headers={"x-context-id": context}) as answer:
        text = "".join(answer.iter_text())
        found = {"status": answer.status_code, "replica": answer.headers.get("x-served-by", ""), "text": ""}
    if answer.status_code == 200 and stream:
        if "[DONE]" not in text:
            raise httpx2.ReadError("the stream ended early")
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        found["text"] = "".join(c["delta"].get("content", "") for x in chunks for c in x["choices"])
    elif answer.status_code == 200:
        found["text"] = json.loads(text)["choices"][0]["message"]["content"]
    return found


def _replica(port: int, folder: str) -> "subprocess.Popen[bytes]":
    words = ["--port", str(port), "--contexts", f"{folder}/contexts", "--max-cached-tokens", "30000"]
    words = [sys.executable, "-m", "opensala", "serve", *words, "--name", "small"]
    return subprocess.Popen(words, stderr=subprocess.DEVNULL)


def _balancer(nginx: str, folder: Path, ports: list[int]) -> "subprocess.Popen[bytes]":
    """nginx with the configuration of the documentation, and our ports in place of those there."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = re.search(r"^```nginx\n(.*?)^```", page, re.M | re.S)
    assert found is not None, "the page has the configuration"
    config = (
        found[1]
        .replace("10.0.0.1:8000", f"127.0.0.1:{ports[0]}")
        .replace("10.0.0.2:8000", f"127.0.0.1:{ports[1]}")
    )
    config = config.replace("listen 80;", f"listen 127.0.0.1:{ports[2]};")
    head = f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
    paths = "".join(
        f"{n}_temp_path {folder}/{n};" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(f"{head}events {{}}\nhttp {{ access_log off; {paths}\n{config}}}\n")
    return subprocess.Popen([nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(url: str) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.3)
    raise SystemExit(f"nothing answers at {url}")


if __name__ == "__main__":
    typer.run(main)
