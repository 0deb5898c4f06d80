"""Traces of requests for images, and how many of them caches of whole images can have at hand.

All images count as one unit of room.
"""

import random
from collections import OrderedDict
from collections.abc import Sequence


def zipf_trace(images: int, length: int, chance: random.Random) -> list[int]:
    """Return requests of which image number N has a share that goes with 1/(N+1)."""
    return chance.choices(range(images), [1 / (rank + 1) for rank in range(images)], k=length)


def cyclic_trace(images: int, length: int) -> list[int]:
    """Return requests for each image in turn, again and again: what is worst for "least recently
    used"."""
    return [place % images for place in range(length)]


def best_hits(trace: Sequence[int], capacity: int) -> int:
    """Return the most hits that any eviction can have, by knowing the future.

    Belady's: what is asked for again last, or never, goes.
    """
    never = len(trace)
    following = [never] * len(trace)
    next_place: dict[int, int] = {}
    for place in range(len(trace) - 1, -1, -1):
        following[place] = next_place.get(trace[place], never)
        next_place[trace[place]] = place
    cached: dict[int, int] = {}
    hits = 0
    for place, item in enumerate(trace):
        if item in cached:
            hits += 1
        elif len(cached) >= capacity:
            del cached[max(cached, key=cached.__getitem__)]
        cached[item] = following[place]
    return hits


def lru_hits(trace: Sequence[int], capacity: int, *, released: int = 1) -> int:
    """Return the hits of "least recently used", which lets `released` images go at a time."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for item in trace:
        if item in cached:
            hits += 1
            cached.move_to_end(item)
            continue
        if len(cached) >= capacity:
            for _ in range(min(released, len(cached))):
                cached.popitem(last=False)
        cached[item] = None
    return hits
