"""What Prometheus is told of tiers of memory, and of the process."""

import re
import sys

import pytest

pytest.importorskip("prometheus_client")

from opensala.server.loop import LoopStats
from opensala.server.metrics import Metrics

from ..contexts.tools import engine


def test_what_moves_between_tiers_is_counted():
    text = Metrics(LoopStats).text().decode()
    assert "opensala_pages_free" in text and "opensala_tier" not in text
    stats = engine(host_memory=1 << 20).tiers().stats()
    text = Metrics(lambda: LoopStats(tiers={**stats, "host_misses": 7})).text().decode()
    assert "# TYPE opensala_tier_host_bytes gauge" in text and "opensala_tier_host_misses_total 7.0" in text
    assert "opensala_tier_disk_bytes_read_total 0.0" in text and "tier_device" not in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_what_the_process_holds_is_told():
    text = Metrics(LoopStats).text().decode()
    held = dict(re.findall(r"^process_(resident_memory_bytes|open_fds) (\S+)$", text, re.M))
    assert float(held["resident_memory_bytes"]) > 1e7 and float(held["open_fds"]) >= 3
