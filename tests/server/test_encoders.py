"""Tokenizers beside the event loop, and what becomes of work that waits for one when a server ends."""

import asyncio
import threading

import pytest

from opensala.server.encoders import Encoders
from opensala.server.errors import ApiError


def test_what_waits_for_a_thread_is_told_of_the_end():
    begun, go_on = threading.Semaphore(0), threading.Event()

    def work(tokenizer):
        begun.release()
        assert go_on.wait(30)
        return tokenizer

    async def scenario():
        encoders = Encoders(["words"])
        under_way = [asyncio.create_task(encoders.run(work)) for _ in range(2)]
        for _ in under_way:
            await asyncio.to_thread(begun.acquire)
        waiting, given_up = (asyncio.create_task(encoders.run(work)) for _ in range(2))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        assert given_up.cancelled()
        encoders.close()
        for task in (waiting, asyncio.create_task(encoders.run(work))):
            with pytest.raises(ApiError, match="shutting down") as refused:
                await task
            assert refused.value.status == 503
        go_on.set()
        assert await asyncio.gather(*under_way) == [["words"]] * 2

    asyncio.run(asyncio.wait_for(scenario(), 60))
