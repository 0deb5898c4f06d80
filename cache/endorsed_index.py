"""The chunk index that an endorser signed: fetched, and checked before anything relies on it."""

import hashlib
from functools import partial

import httpx
import trio

from stratocache.cache.configuration import FetchSettings
from stratocache.cache.entry import Entry
from stratocache.cache.errors import NotVerified
from stratocache.cache.location import read_location
from stratocache.cache.manifest import Manifest, index_bytes
from stratocache.cache.peers import Peers


async def read_index(
    entry: Entry, client: httpx.AsyncClient, settings: FetchSettings, peers: Peers | None = None
) -> Manifest:
    """Return the index that an entry endorses, after every check of it; for a raw image, the length
    of whose index is known, peers are asked first.

    Its length follows from the size of the image, or for qcow2, whose entry does not say that, from
    `fetch.max_image_bytes`: never more is read. Raises `NotVerified` (`index-mismatch`,
    `manifest-invalid`) and what `read_location` raises.
    """
    assert entry.index is not None
    bytes_max = entry.size_bytes if entry.format == "raw" else settings.max_image_bytes
    if peers is not None and entry.format == "raw":
        check = partial(check_index, entry=entry, image_bytes_max=bytes_max)
        offer = await peers.manifest(entry.identifier, index_bytes(bytes_max), check)
        if offer is not None:
            return offer.content
    content = await read_location(entry.index.url, index_bytes(bytes_max), client, settings)
    return await trio.to_thread.run_sync(check_index, content, entry, bytes_max)


def check_index(content: bytes, entry: Entry, image_bytes_max: int) -> Manifest:
    """Return what an index says if it is the one that the entry endorses; raises `NotVerified`.

    It describes the bytes that a guest sees: for qcow2 those of the virtual disk.
    """
    assert entry.index is not None
    url = entry.index.url[:200]
    raw = entry.format == "raw"
    if raw and len(content) != index_bytes(entry.size_bytes):
        raise _mismatch(url, f"it has not the length of an index of {entry.size_bytes} bytes")
    found = hashlib.sha256(content).hexdigest()
    if found != entry.index.sha256:
        raise _mismatch(url, f"its SHA-256 is {found}, the entry promises {entry.index.sha256}")
    manifest = Manifest.parse(content, url, image_bytes_max=image_bytes_max)
    if raw and manifest.size_bytes != entry.size_bytes:
        raise _mismatch(url, f"it describes {manifest.size_bytes} bytes, not {entry.size_bytes}")
    return manifest


def _mismatch(url: str, fault: str) -> NotVerified:
    return NotVerified("index-mismatch", f"The chunk index {url} is not the endorsed one: {fault}.")
