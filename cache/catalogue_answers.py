"""Reading what a StratusLab catalogue says of an image: over HTTP, or from a folder.

Nothing is judged here; limits on time, size and redirects are kept here.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import httpx
import trio

from stratocache.cache import document, reference
from stratocache.cache.configuration import FetchSettings
from stratocache.cache.errors import (
    InvalidInput,
    NotVerified,
    OriginFailed,
    Refused,
    StratocacheError,
)
from stratocache.cache.outgoing import respond
from stratocache.cache.selection import Selection

_UNREACHABLE = "catalogue-unreachable"
_MAX_REDIRECTS = 5
_MAX_FILES = 10_000
_ACCEPT = "application/rdf+xml, application/xml;q=0.9, */*;q=0.1"


@dataclass(frozen=True)
class Answer:
    """Bytes of a catalogue, and the URL or path they came from."""

    source: str
    data: bytes


async def read_answers(
    endpoint: str,
    selection: Selection,
    client: httpx.AsyncClient,
    limits: FetchSettings,
    *,
    certain: bool = False,
) -> list[Answer]:
    """Return what the catalogue has; nothing when it does not know the image.

    When it does not list the image it is asked once more, for what expired or was deprecated; that
    it has nothing such either is `certain` only if it says so. Raises `OriginFailed` with code
    `catalogue-unreachable`.
    """
    base = reference.endpoint_base(endpoint)
    parts = urlsplit(base)
    if parts.scheme.lower() == "file":
        folder = Path(unquote(parts.path))
        return await trio.to_thread.run_sync(_read_folder, folder, selection)
    path = "/".join(quote(segment, safe="@:+") for segment in selection.segments)
    url = f"{base}/metadata/{path}"
    answer = await _get(url, client, limits)
    if answer is None and selection.created is None:
        # The default list leaves out what expired or was deprecated; its reason is worth a try.
        try:
            answer = await _get(f"{url}?status=all", client, limits)
        except OriginFailed:
            if certain:
                raise
            return []
    return [] if answer is None else [answer]


async def _get(url: str, client: httpx.AsyncClient, limits: FetchSettings) -> Answer | None:
    """Return the body at a URL; None for 404 and for a list without entries."""
    deadline_s = limits.connect_timeout_s + limits.read_timeout_s
    timeouts = httpx.Timeout(limits.read_timeout_s, connect=limits.connect_timeout_s)
    try:
        with trio.fail_after(deadline_s):
            answer = await _ask(url, client, timeouts)
    except trio.TooSlowError:
        raise _unreachable(url, f"it took longer than {deadline_s:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(url, str(error) or type(error).__name__) from None
    except (Refused, OriginFailed) as error:
        if error.code == _UNREACHABLE:
            raise
        raise _unreachable(url, error.message.rstrip(".")) from None
    if answer is None or await trio.to_thread.run_sync(_is_empty, answer):
        return None
    return answer


async def _ask(url: str, client: httpx.AsyncClient, timeouts: httpx.Timeout) -> Answer | None:
    headers = {"Accept": _ACCEPT, "Accept-Encoding": "identity"}
    async with respond(
        client, url, headers, timeouts, redirects_max=_MAX_REDIRECTS
    ) as response:  # fmt: skip
        if response.status_code in (404, 410):
            return None
        if response.status_code != 200:
            raise _unreachable(str(response.url), f"it answered with status {response.status_code}")
        if "content-encoding" in response.headers:
            raise _unreachable(str(response.url), "it compressed its answer without being asked to")
        return Answer(str(response.url), await _limited(response))


async def _limited(response: httpx.Response) -> bytes:
    body = bytearray()
    # Left by cancelling: breaking off would abandon the client's nested generators half way.
    with trio.CancelScope() as enough:
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > document.MAX_BYTES:
                enough.cancel()
    # One byte too many is enough for the parser to refuse it.
    return bytes(body[: document.MAX_BYTES + 1])


def _is_empty(answer: Answer) -> bool:
    if not answer.data.strip():
        return True
    try:
        return not document.parse(answer.data)
    except StratocacheError:
        return False


def _read_folder(folder: Path, selection: Selection) -> list[Answer]:
    """Read `<id>/<email>/<created>.xml`, and the files lying flat that name the identifier."""
    if not folder.is_dir():
        raise _unreachable(str(folder), "there is no such folder")
    wanted = selection.identifier.encode("ascii")
    answers = []
    try:
        paths = [*folder.glob("*.xml"), *folder.glob(f"{selection.identifier}/*/*.xml")]
        for path in sorted(paths)[:_MAX_FILES]:
            try:
                data = document.read(path)
            except NotVerified:
                # Too large for an entry, so not the one that is meant.
                continue
            if wanted in data:
                answers.append(Answer(str(path), data))
    except (OSError, InvalidInput) as error:
        raise _unreachable(str(folder), str(error)) from None
    return answers


def _unreachable(where: str, reason: str) -> OriginFailed:
    return OriginFailed(
        _UNREACHABLE,
        f"The catalogue at {where} cannot be read: {reason}. Try again, or check its endpoint.",
    )
