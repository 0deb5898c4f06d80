"""Asking one peer: HTTPS to an address, judged before a byte of the answer's body is read.

The certificate must be of the peers' own authority and of the name that the configuration gives,
else nothing is sent, the token least of all. No redirect is followed, no proxy used. An answer has a
`Content-Length` that fits and no content coding, so no more is read than was asked for.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import trio

from stratocache.cache.chunk_origins import Unavailable
from stratocache.cache.configuration import PeersSettings
from stratocache.cache.errors import StratocacheError
from stratocache.cache.origin import ERRORS_THAT_PASS, PASSING_STATUSES, retry_after_s
from stratocache.cache.peer_token import TokenFile

BUSY = "peer-busy"
"""The code by which a peer sends us elsewhere, which is no fault of its."""
_PROBLEM_BYTES_MAX = 4096
_CONNECTIONS_KEPT = 64
_CLOSE_TIMEOUT_S = 0.2
_CONNECT_SHARE = 0.45
"""Of the time-out, for each of connecting and the handshake; a client that is cancelled there leaves
its socket open until it is collected."""
_KEEP_ALIVE_S = 15.0
"""Less than peers keep a connection that is not used: none is closed as we send on it."""


@dataclass(eq=False)
class Peer:
    """One address of a host that is configured."""

    host: str
    """As it is configured, without the port: the name in its certificate."""
    address: str
    port: int
    asked: int = 0
    """Requests for chunks and manifests."""
    served: int = 0
    """Of them, answered with the right bytes."""
    failed: int = 0
    """Of them, not answered, late, or answered wrongly; that it lacks something is no failure."""
    received_bytes: int = 0
    """Right or wrong."""
    lacks: dict[str, float] = field(default_factory=dict)
    """Images that it does not have, and until when that is believed."""

    @property
    def location(self) -> str:
        """The URL by which its failures are remembered."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"https://{address}:{self.port}"


class PeerClient:
    """Asks peers; belongs to one trio loop, in which `aclose` ends it."""

    def __init__(self, settings: PeersSettings) -> None:
        self._settings = settings
        self._token = TokenFile(settings.token_file)
        self._client: httpx.AsyncClient | None = None

    async def aclose(self) -> None:
        """Close all connections."""
        client, self._client = self._client, None
        if client is not None:
            with trio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
                await client.aclose()

    async def get(
        self, peer: Peer, path: str, fits: Callable[[int], bool], timeout_s: float
    ) -> bytes:
        """Return what a peer has at a path, if `fits` says yes to its length.

        Raises `Unavailable`: `absent` when the peer says that it has no such thing, with the reason
        `image-unknown` when it has nothing of the image, or that it is `BUSY`.
        """
        with trio.move_on_after(timeout_s) as limit:
            return await self._get(peer, path, fits, _CONNECT_SHARE * timeout_s)
        assert limit.cancelled_caught
        raise Unavailable(f"it did not answer within {timeout_s:g} s")

    async def _get(
        self, peer: Peer, path: str, fits: Callable[[int], bool], connect_s: float
    ) -> bytes:
        client, token = self._open(), self._own_token()
        try:
            request = client.build_request(
                "GET", peer.location + path,
                headers={"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": peer.host},
                timeout=httpx.Timeout(None, connect=connect_s),
            )  # fmt: skip
            response = await client.send(request, stream=True, follow_redirects=False)
            try:
                declared = _declared_bytes(response)
                if response.status_code != 200:
                    raise await _refusal(response, declared)
                if not fits(declared):
                    raise Unavailable(f"it sends {declared} bytes, which cannot be right", "wrong")
                return await response.aread()
            finally:
                # a peer that takes no farewell is not waited for
                with trio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
                    await response.aclose()
        except ERRORS_THAT_PASS as error:
            raise _failure(error) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # of names, the last
            raise Unavailable(f"it failed: {_describe(error)}", "wrong") from None

    def _own_token(self) -> str:
        try:
            return self._token.tokens()[0]
        except StratocacheError as error:
            raise Unavailable(error.message, "wrong") from None

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            try:
                context = ssl.create_default_context(cafile=str(self._settings.ca_file))
            except OSError as error:  # ssl.SSLError is one
                reason = f"the authorities in {self._settings.ca_file} cannot be read: {error}"
                raise Unavailable(reason, "wrong") from None
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            self._client = httpx.AsyncClient(  # nosec B113 # each request has its own
                verify=context, trust_env=False, timeout=None,
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=_CONNECTIONS_KEPT,
                    keepalive_expiry=_KEEP_ALIVE_S,
                ),
            )  # fmt: skip
        return self._client


def _declared_bytes(response: httpx.Response) -> int:
    """Return the length that an answer is going to have."""
    text = response.headers.get("Content-Length", "")
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise Unavailable("it does not say how much it sends", "wrong")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise Unavailable("it sends a content coding that nobody asked for", "wrong")
    return int(text)


async def _refusal(response: httpx.Response, declared_bytes: int) -> Unavailable:
    status, code = response.status_code, ""
    if status in (404, 503) and declared_bytes <= _PROBLEM_BYTES_MAX:
        await response.aread()
        code = _code(response)
    if status == 404 or code == BUSY:
        return Unavailable(code or "it has no such thing", "absent")
    if status == 401:
        return Unavailable("it does not accept our token", "wrong")
    if status in PASSING_STATUSES:
        return Unavailable(f"it answers {status}", retry_after_s=retry_after_s(response))
    return Unavailable(f"it answers {status}", "wrong")


def _code(response: httpx.Response) -> str:
    try:
        problem = response.json()
    except ValueError:
        return ""
    code = problem.get("code", "") if isinstance(problem, dict) else ""
    return code if isinstance(code, str) else ""


def _failure(error: Exception) -> Unavailable:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Unavailable(f"its certificate is not a peer's: {cause.verify_message}", "wrong")
        cause = cause.__cause__ or cause.__context__
    return Unavailable(f"the connection failed: {_describe(error)}")


def _describe(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
