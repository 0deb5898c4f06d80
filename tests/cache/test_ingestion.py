"""Bytes read once, given side by side to digests and to a chain of steps."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotVerified
from stratocache.cache.ingestion import Batch, Step, ingest

TAIL_BYTES = 1000
CHUNKS = 60
HELD_CHUNKS_MAX = 48
"""Twenty-four mebibytes."""


class _Failed(NotVerified):
    """What a test raises."""

    def __init__(self) -> None:
        super().__init__("digest-mismatch", "It failed on purpose.")


def _chunks(count: int = CHUNKS) -> Iterator[bytes]:
    for number in range(count - 1):
        yield bytes([number % 251]) * CHUNK_BYTES
    yield b"\1" * TAIL_BYTES


def _ingest(
    chunks: Iterator[bytes], sink: Sequence[Step], report: Callable[[int], None] | None = None
) -> tuple[int, dict[str, str]]:
    async def run() -> tuple[int, dict[str, str]]:
        return await ingest(
            chunks, sink, ("sha1", "sha512"), limiter=trio.CapacityLimiter(6),
            progress=report or (lambda _: None),
        )  # fmt: skip

    return trio.run(run)


def test_every_digest_and_every_step_gets_all_bytes_in_order() -> None:
    """Digests are those of all bytes; the last step is given what the one before made of them."""
    taken: list[bytes] = []
    reported: list[int] = []

    def mark(batch: Batch) -> list[tuple[int, bytes]]:
        return [(len(chunk), chunk) for chunk in batch]

    def keep(marked: list[tuple[int, bytes]]) -> None:
        assert all(length == len(chunk) for length, chunk in marked)
        taken.extend(chunk for _, chunk in marked)

    size_bytes, digests = _ingest(_chunks(), [mark, keep], reported.append)

    whole = b"".join(_chunks())
    assert taken == list(_chunks())
    assert size_bytes == reported[-1] == len(whole)
    assert reported == sorted(set(reported))
    assert digests == {name: hashlib.new(name, whole).hexdigest() for name in ("sha1", "sha512")}


def test_nothing_but_digests_and_nothing_at_all() -> None:
    """Without a sink there are digests; without bytes they are those of nothing."""
    assert _ingest(_chunks(2), ())[0] == CHUNK_BYTES + TAIL_BYTES
    assert _ingest(iter(()), [_as_it_is])[1]["sha1"] == hashlib.sha1(b"").hexdigest()


def _as_it_is(item: Any) -> Any:
    return item


@pytest.mark.parametrize("place", ["reader", "first step", "last step"])
@pytest.mark.parametrize("at_chunk", [0, 20, CHUNKS - 1])
@pytest.mark.parametrize("failure", [_Failed(), OSError(28, "No space left on device")])
def test_first_failure_ends_everything_and_is_raised_bare(
    place: str, at_chunk: int, failure: Exception
) -> None:
    """Whoever fails, wherever, that failure is what the caller gets, and the reading ends."""
    read = 0

    def reading() -> Iterator[bytes]:
        nonlocal read
        for number, chunk in enumerate(_chunks(10 * CHUNKS)):
            read += 1
            if place == "reader" and number == at_chunk:
                raise failure
            yield chunk

    def step(name: str) -> Step:
        seen = 0

        def work(batch: Batch) -> Batch:
            nonlocal seen
            seen += len(batch)
            if place == name and seen > at_chunk:
                raise failure
            return batch

        return work

    with pytest.raises(type(failure)) as raised:
        _ingest(reading(), [step("first step"), step("last step")])
    assert raised.value is failure
    assert read <= at_chunk + 1 + HELD_CHUNKS_MAX


def test_slow_step_bounds_what_is_in_memory() -> None:
    """While the last step is at work, no more is read than may wait for it."""
    read = 0
    begun, released = threading.Event(), threading.Event()

    def reading() -> Iterator[bytes]:
        nonlocal read
        for chunk in _chunks(4 * CHUNKS):
            read += 1
            yield chunk

    def wait(_: Batch) -> None:
        begun.set()
        released.wait(30)

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: ingest(
                    reading(), [_as_it_is, wait], (), limiter=trio.CapacityLimiter(6),
                    progress=lambda _: None,
                )
            )  # fmt: skip
            await trio.to_thread.run_sync(begun.wait, 30)
            await trio.testing.wait_all_tasks_blocked(0.2)
            held = read
            released.set()
        return held

    assert 0 < trio.run(main) <= HELD_CHUNKS_MAX
    assert read == 4 * CHUNKS


def test_cancelling_waits_for_what_is_at_work() -> None:
    """No step still runs once a cancelled ingestion has ended: its caller may remove the files."""
    begun, released = threading.Event(), threading.Event()
    ended: list[bool] = []

    def store(_: Batch) -> None:
        begun.set()
        released.wait(30)
        ended.append(True)

    async def main() -> bool:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    await trio.to_thread.run_sync(begun.wait, 30)
                    scope.cancel()
                    released.set()

                nursery.start_soon(cancel)
                await ingest(
                    _chunks(), [store], ("sha256",), limiter=trio.CapacityLimiter(6),
                    progress=lambda _: None,
                )  # fmt: skip
        return scope.cancelled_caught

    assert trio.run(main)
    assert ended == [True]
