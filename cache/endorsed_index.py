"""The chunk index that an endorser signed: fetched, and checked before anything relies on it."""

import hashlib

import httpx
import trio

from stratocache.cache.configuration import FetchSettings
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotVerified
from stratocache.cache.location import read_location
from stratocache.cache.manifest import Manifest, index_bytes


async def read_index(entry: Entry, client: httpx.AsyncClient, settings: FetchSettings) -> Manifest:
    """Return the index that an entry endorses, after every check of it.

    Its length follows from the size of the image, so never more is read. Raises `NotVerified`
    (`index-mismatch`, `manifest-invalid`) and what `read_location` raises.
    """
    assert entry.index is not None
    content = await read_location(entry.index.url, index_bytes(entry.size_bytes), client, settings)
    return await trio.to_thread.run_sync(check_index, content, entry)


def check_index(content: bytes, entry: Entry) -> Manifest:
    """Return what an index says if it is the one that the entry endorses; raises `NotVerified`."""
    assert entry.index is not None
    url = entry.index.url[:200]
    if len(content) != index_bytes(entry.size_bytes):
        raise _mismatch(url, f"it has not the length of an index of {entry.size_bytes} bytes")
    found = hashlib.sha256(content).hexdigest()
    if found != entry.index.sha256:
        raise _mismatch(url, f"its SHA-256 is {found}, the entry promises {entry.index.sha256}")
    manifest = Manifest.parse(content, url, image_bytes_max=entry.size_bytes)
    if manifest.size_bytes != entry.size_bytes:
        raise _mismatch(url, f"it describes {manifest.size_bytes} bytes, not {entry.size_bytes}")
    return manifest


def _mismatch(url: str, fault: str) -> NotVerified:
    return NotVerified("index-mismatch", f"The chunk index {url} is not the endorsed one: {fault}.")
