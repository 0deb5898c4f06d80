"""Outgoing requests: whom they may reach, decided for the very address that is connected to.

Two kinds. *Sources* are what the operator configured or an accepted endorser signed: they may be in
the site's own networks. An *import* goes where a user says: to the public Internet, ports 80, 443 and
from 1024 on, and to `fetch.allowed_networks`. Nobody is sent to link-local addresses, those of
metadata services among them.

A name is resolved once, its addresses are judged, and one of those is connected to: a name that
changes meanwhile changes nothing. Every hop of a redirect is judged; one that comes from a public
address is judged as an import is, so that no server out there can aim at one in here. With a proxy
(`https_proxy`, `no_proxy`) the proxy connects: what can be resolved here is judged before.
"""

import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.request import getproxies_environment, proxy_bypass

import httpcore
import httpx
import trio

from stratocache.cache import networks
from stratocache.cache.configuration import FetchSettings
from stratocache.cache.errors import OriginFailed, Refused
from stratocache.cache.networks import Address, Network

_REDIRECTED = "stratocache_redirected"
"""Extension of a request that a public server's redirect asked for."""
_REDIRECTS_MAX = 10
_WEB_PORTS = frozenset({80, 443})
_FIRST_FREE_PORT = 1024
_HEAD_START_S = 0.25
"""Of one address of a name before the next one is tried beside it (RFC 8305)."""


@dataclass(frozen=True)
class Reach:
    """Which addresses may be connected to."""

    site: bool
    """The site's own networks too, this host among them."""
    allowed_networks: tuple[Network, ...] = ()

    def permits(self, address: Address, port: int) -> bool:
        """Whether a connection to an address and port may be opened."""
        if networks.is_never_reached(address):
            return False
        if self.site or networks.is_in(networks.plain(address), self.allowed_networks):
            return True
        harmless = port in _WEB_PORTS or port >= _FIRST_FREE_PORT
        return harmless and networks.is_public(address) and not _is_this_host(address)

    def choose(self, host: str, port: int, addresses: Sequence[str]) -> list[str]:
        """Return those of a name's addresses that are permitted; raises `Refused`."""
        chosen = [one for one in addresses if self.permits(networks.parse_address(one), port)]
        if not chosen:
            raise Refused(
                "location-refused",
                f"{host[:100]} port {port} is not to be reached from here; an operator can list its "
                "network in fetch.allowed_networks, unless it is link-local.",
            )
        return chosen


def source_client(settings: FetchSettings) -> httpx.AsyncClient:
    """Return a client for catalogues and what their entries name."""
    return _client(settings, Reach(True, settings.allowed_networks))


def import_client(settings: FetchSettings) -> httpx.AsyncClient:
    """Return a client for addresses that users give."""
    return _client(settings, Reach(False, settings.allowed_networks))


def _client(settings: FetchSettings, reach: Reach) -> httpx.AsyncClient:
    timeout = httpx.Timeout(settings.read_timeout_s, connect=settings.connect_timeout_s)
    narrow = Reach(False, settings.allowed_networks)
    return httpx.AsyncClient(timeout=timeout, transport=_Transport(reach, narrow))


@asynccontextmanager
async def respond(
    client: httpx.AsyncClient, location: str, headers: dict[str, str], limits: httpx.Timeout,
    *, redirects_max: int = _REDIRECTS_MAX,
) -> AsyncIterator[httpx.Response]:  # fmt: skip
    """Ask for a location, follow its redirects, and yield the answer before its body is read.

    Raises `Refused` (`location-refused`), `OriginFailed` (`origin-failed`) and what httpx raises.
    """
    url = httpx.URL(location)
    redirected = False
    for hop in range(redirects_max + 1):
        if url.scheme not in ("http", "https") or not url.host:
            raise Refused("location-refused", f"It leads to {str(url)[:200]}, not http or https.")
        if hop and url.userinfo:
            raise Refused("location-refused", "It redirects with a name and a password.")
        request = client.build_request(
            "GET", url, headers=headers, timeout=limits, extensions={_REDIRECTED: redirected}
        )
        response = await client.send(request, stream=True, follow_redirects=False)
        try:
            if not response.has_redirect_location:
                yield response
                return
            redirected = redirected or _came_from_outside(response)
            url = url.join(response.headers["Location"])
        finally:
            with trio.CancelScope(shield=True):
                await response.aclose()
    raise OriginFailed("origin-failed", f"It redirects more than {redirects_max} times.")


class _Transport(httpx.AsyncBaseTransport):
    """Connects as `reach` permits, and as `narrow` does after a redirect of a public server.

    They have pools of their own: no connection that was judged by one is used for the other.
    """

    def __init__(self, reach: Reach, narrow: Reach) -> None:
        self._context = httpx.create_ssl_context()
        self._reaches = (reach, narrow)
        self._direct = tuple(_checked(self._context, each) for each in self._reaches)
        self._proxied: dict[tuple[str, bool], httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises `Refused` (`location-refused`) before anything is sent."""
        redirected = bool(request.extensions.get(_REDIRECTED, False))
        url = request.url
        proxy = _proxy_of(url)
        if proxy is None:
            return await self._direct[redirected].handle_async_request(request)
        await self._judge(url, self._reaches[redirected])
        return await self._through(proxy, redirected).handle_async_request(request)

    async def _judge(self, url: httpx.URL, reach: Reach) -> None:
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            addresses = await _resolve(url.host, port)
        except OSError:
            return  # only the proxy knows the name
        reach.choose(url.host, port, addresses)

    def _through(self, proxy: str, redirected: bool) -> httpx.AsyncHTTPTransport:
        key = (proxy, redirected)
        if key not in self._proxied:
            self._proxied[key] = httpx.AsyncHTTPTransport(verify=self._context, proxy=proxy)
        return self._proxied[key]

    async def aclose(self) -> None:
        """Close all connections."""
        for transport in (*self._direct, *self._proxied.values()):
            await transport.aclose()


class _Backend(httpcore.AsyncNetworkBackend):
    """Opens the connections of one pool."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._plain = httpcore.TrioBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:  # fmt: skip
        """Resolve, judge, and connect to one of the addresses that were judged."""
        try:
            with trio.fail_after(float("inf") if timeout is None else timeout):
                addresses = self._reach.choose(host, port, await _resolve(host, port))
                return await self._first(addresses, port)
        except trio.TooSlowError:
            raise httpcore.ConnectTimeout(f"{host} does not take connections") from None
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from None

    async def _first(self, addresses: Sequence[str], port: int) -> httpcore.AsyncNetworkStream:
        """Return the first connection to come about; one address after another gets its chance."""
        connected: list[httpcore.AsyncNetworkStream] = []
        errors: list[httpcore.ConnectError] = []

        async def attempt(address: str, ended: trio.Event) -> None:
            try:
                stream = await self._plain.connect_tcp(address, port)
            except httpcore.ConnectError as error:
                errors.append(error)
                ended.set()
                return
            connected.append(stream)
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    ended = trio.Event()
                    nursery.start_soon(attempt, address, ended)
                    with trio.move_on_after(_HEAD_START_S):
                        await ended.wait()
            if not connected:
                raise errors[-1]
            return connected.pop(0)
        finally:  # those that came too late, or all, as whoever wanted one has gone
            with trio.CancelScope(shield=True):
                for late in connected:
                    await late.aclose()

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await trio.sleep(seconds)


def _checked(context: object, reach: Reach) -> httpx.AsyncHTTPTransport:
    """Return a transport of httpx whose connections are opened by `_Backend`."""
    transport = httpx.AsyncHTTPTransport(verify=context)  # type: ignore[arg-type]
    # httpx takes no network back end, httpcore below it does
    pool = transport._pool
    assert isinstance(pool, httpcore.AsyncConnectionPool)
    pool._network_backend = _Backend(reach)
    return transport


async def _resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, best first; of a literal in any notation, that one."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _proxy_of(url: httpx.URL) -> str | None:
    proxies = getproxies_environment()
    if not proxies or proxy_bypass(url.host):
        return None
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy:
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _came_from_outside(response: httpx.Response) -> bool:
    stream = response.extensions.get("network_stream")
    server = stream.get_extra_info("server_addr") if stream is not None else None
    return server is not None and networks.is_public(networks.parse_address(server[0]))


def _is_this_host(address: Address) -> bool:
    """Whether it is an address of an interface here: the kernel then answers from that very one."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((str(address), 9))
        except OSError:
            return False  # no way there
        return bool(probe.getsockname()[0] == str(address))
