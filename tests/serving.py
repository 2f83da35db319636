"""`opensala serve` as a process of its own, for the tests that speak to one."""

import contextlib
import os
import re
import signal
import subprocess
import sys


@contextlib.contextmanager
def serving(options, stop=signal.SIGTERM):
    """Start a server on a free port; gives its URL. It must end with exit code 0 when it is told to
    stop."""
    words = [sys.executable, "-m", "opensala", "serve", *options, "--port", "0"]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        said = ""
        for line in process.stderr:
            said += line
            found = re.search(r"^serving \S+ at (http://\S+) ", line)
            if found:
                break
        else:
            raise AssertionError(f"it did not start: {said}")
        yield found[1].replace("//0.0.0.0:", "//127.0.0.1:")
        process.send_signal(stop)
        assert process.wait(60) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
