"""Small files at locations: a chunk index, and what lies beside it. Read whole, into memory."""

import os
from contextlib import closing
from urllib.parse import urlsplit, urlunsplit

import httpx
import trio

from stratocache.cache.configuration import FetchSettings
from stratocache.cache.errors import NotFound, OriginFailed
from stratocache.cache.origin import (
    ERRORS_THAT_PASS,
    GONE_STATUSES,
    Backoff,
    open_file,
    retry_after_s,
)
from stratocache.cache.outgoing import respond

INDEX_SUFFIX = ".caibx"


def beside_index(index_url: str, suffix: str) -> str | None:
    """Return the location `NAME.SUFFIX` beside `NAME.caibx`, None for an index of another name."""
    parts = urlsplit(index_url)
    if not parts.path.endswith(INDEX_SUFFIX):
        return None
    path = parts.path.removesuffix(INDEX_SUFFIX) + suffix
    return urlunsplit(parts._replace(path=path, fragment=""))


async def read_location(
    url: str, bytes_max: int, client: httpx.AsyncClient, settings: FetchSettings, *,
    backoff: Backoff | None = None,
) -> bytes:  # fmt: skip
    """Return what a location serves; when that is more than `bytes_max`, somewhat more than that.

    Raises `NotFound` (`location-not-found`), `Refused` (`location-refused`) and `OriginFailed`
    (`origin-failed`).
    """
    if urlsplit(url).scheme == "file":
        return await trio.to_thread.run_sync(_read_file, url, bytes_max)
    pauses = backoff or Backoff()
    limits = httpx.Timeout(settings.read_timeout_s, connect=settings.connect_timeout_s)
    failures = 0
    while True:
        reason, wait_s = "", 0.0
        try:
            async with respond(client, url, {"Accept-Encoding": "identity"}, limits) as response:
                if response.status_code == 200:
                    return await _body(response, bytes_max)
                reason = f"the server answers {response.status_code}"
                wait_s = retry_after_s(response)
                if response.status_code in GONE_STATUSES:
                    raise NotFound("location-not-found", f"{url[:200]}: {reason}.")
        except ERRORS_THAT_PASS as error:
            reason = str(error)[:200] or type(error).__name__
        except (httpx.InvalidURL, httpx.HTTPError) as error:
            raise OriginFailed("origin-failed", f"{url[:200]} failed: {error}.") from None
        failures += 1
        if failures >= settings.attempts:
            raise OriginFailed("origin-failed", f"{url[:200]}: {reason} ({failures} attempts).")
        await trio.sleep(pauses.pause_s(failures, wait_s))


def _read_file(url: str, bytes_max: int) -> bytes:
    with closing(open_file(url)) as file:
        return os.pread(file.fileno(), bytes_max + 1, 0)


async def _body(response: httpx.Response, bytes_max: int) -> bytes:
    body = bytearray()
    with trio.CancelScope() as stop:
        async for data in response.aiter_raw():
            body += data
            if len(body) > bytes_max:
                stop.cancel()
    return bytes(body)
