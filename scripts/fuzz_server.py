"""Cases that schemathesis makes up from the server's own description; none may be answered with a 5xx.

    pip install schemathesis
    python scripts/fuzz_server.py --cases 20000

It starts `opensala serve` with contexts and short answers, and runs `st run` with one seed after the other,
until there were so many cases. What it finds is printed as schemathesis prints it; the last line on stdout is
JSON. Exit code 1 if something was found, or if the server holds something afterwards.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import httpx2
import typer


def main(
    cases: int = 20_000,
    per_operation: Annotated[int, typer.Option(help="Cases of one path and method with one seed.")] = 100,
    seed: int = 1,
    st: Annotated[str, typer.Option(help="The schemathesis command.")] = "st",
    model: Annotated[str | None, typer.Option(help="What to serve. Default: the shipped model.")] = None,
) -> None:
    """Fuzz the server and say what became of the cases."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "opensala", "serve", *([model] if model else []), "--port", "0"]
        limits = ["--max-new-tokens", "16", "--default-new-tokens", "4", "--max-cached-tokens", "30000"]
        server = subprocess.Popen(
            [*words, *limits, "--contexts", folder], stderr=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            url = _url(server)
            log = (Path(folder).parent / "fuzz_server.log").open("w")
            drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=log)
            found = _fuzz(st, url, cases, per_operation, seed)
            held = _held(url)
            drain.terminate()
        finally:
            server.terminate()
            code = server.wait(60)
    print(json.dumps({**found, "held": held, "exit": code}))
    sys.exit(1 if found["failed"] or held or code else 0)


def _url(server: "subprocess.Popen[str]") -> str:
    assert server.stderr is not None, "it is a pipe"
    for line in server.stderr:
        found = re.search(r"serving \S+ at (http://\S+) ", line)
        if found:
            return found[1]
    raise SystemExit("the server did not start")


def _fuzz(st: str, url: str, cases: int, per_operation: int, seed: int) -> dict[str, object]:
    """Run seeds until there were so many cases; how many answers had which status."""
    statuses: Counter[str] = Counter()
    failed, began = 0, time.monotonic()
    while statuses.total() < cases and not failed:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "events.ndjson"
            words = [st, "run", f"{url}/openapi.json", "--url", url, "--checks", "not_a_server_error"]
            words += ["--phases", "fuzzing", "--max-examples", str(per_operation), "--seed", str(seed)]
            words += ["--suppress-health-check", "all", "--generation-database", "none", "--no-color"]
            words += ["--request-timeout", "60", "--warnings", "off", "--report-ndjson-path", str(report)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            done = subprocess.run(words, cwd=folder, text=True, **pipes)  # it leaves a cache where it runs
            statuses += Counter(re.findall(r'"status_code":\s*(\d+)', report.read_text()))
        if done.returncode:
            print(done.stdout)
            failed += 1
        print(
            f"seed {seed}: {statuses.total():,} cases in {time.monotonic() - began:.0f} s, {dict(statuses)}",
            file=sys.stderr,
        )
        seed += 1
    return {"cases": statuses.total(), "statuses": statuses, "failed": failed, "next_seed": seed}


def _held(url: str) -> dict[str, str]:
    """What runs or waits when nobody asks any more."""
    time.sleep(2)
    text = httpx2.get(f"{url}/metrics").raise_for_status().text
    found = dict(re.findall(r"^opensala_(requests_running|requests_waiting) ([\d.e+]+)$", text, re.M))
    return {name: value for name, value in found.items() if float(value)}


if __name__ == "__main__":
    typer.run(main)
