"""Outgoing requests against real servers: whom they reach, after redirects and changes of names."""

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
import trio
from support.origins import Fault, OriginServer, Resource

from stratocache.cache.catalogue_answers import read_answers
from stratocache.cache.configuration import FetchSettings
from stratocache.cache.errors import OriginFailed, Refused
from stratocache.cache.outgoing import import_client, respond, source_client
from stratocache.cache.selection import Selection

LIMITS = httpx.Timeout(20)
PLAIN = ["127.0.0.1", "localhost", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]"]
HOSTS_THAT_MEAN_LOOPBACK = [
    *PLAIN,
    "127.1", "0x7f000001", "0x7f.1", "0177.0.0.1",
    "017700000001", "127.0.0.1.", "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:7f00:0001]", "[::127.0.0.1]", "0", "[64:ff9b::7f00:1]",
    "example.org@127.0.0.1", "name:word@localhost",
]  # fmt: skip


def settings(*allowed: str) -> FetchSettings:
    """Return settings that allow networks."""
    return FetchSettings(
        connect_timeout_s=20, allowed_networks=tuple(ip_network(name) for name in allowed)
    )


def get(client: httpx.AsyncClient, *urls: str, resolver: Any = None) -> list[tuple[int, bytes]]:
    """Ask for addresses one after another; return statuses and bodies."""

    async def ask() -> list[tuple[int, bytes]]:
        if resolver is not None:
            trio.socket.set_custom_hostname_resolver(resolver)
        answers = []
        async with client:
            for url in urls:
                async with respond(client, url, {}, LIMITS) as response:
                    answers.append((response.status_code, await response.aread()))
        return answers

    return trio.run(ask)


class Names(trio.abc.HostnameResolver):
    """A name server whose answers change: each question takes the next, the last one stays."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked: list[str] = []
        self._answers = deque(answers)

    async def getaddrinfo(
        self, host: bytes | None, port: bytes | str | int | None, *_: object, **__: object
    ) -> list[Any]:
        """Answer a question."""
        self.asked.append((host or b"").decode())
        addresses = self._answers[0]
        if len(self._answers) > 1:
            self._answers.popleft()
        stream = socket.SOCK_STREAM
        return [(socket.AF_INET, stream, 6, "", (address, port)) for address in addresses]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        """Answer nothing."""
        raise NotImplementedError


@contextmanager
def silent_victim() -> Iterator[int]:
    """Listen on loopback, IPv4 and IPv6; yield the port. Nobody may even connect."""
    with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
        four.bind(("127.0.0.1", 0))
        port: int = four.getsockname()[1]
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(("::1", port))
        for listener in (four, six):
            listener.listen()
            listener.setblocking(False)
        yield port
        for listener in (four, six):
            with pytest.raises(BlockingIOError):
                listener.accept()


@pytest.fixture
def elsewhere() -> Iterator[OriginServer]:
    """A server on another loopback address."""
    with OriginServer("127.0.0.2") as server:
        yield server


def redirect(server: OriginServer, path: str, *targets: str) -> str:
    """Have a path redirect to each of the targets in turn; return its address."""
    faults = deque(Fault(302, {"Location": target}) for target in targets)
    return server.add(path, Resource(b"", faults=faults))


@pytest.mark.parametrize("host", HOSTS_THAT_MEAN_LOOPBACK)
def test_imports_do_not_reach_this_host(host: str) -> None:
    """However its address is written, an import does not so much as connect to this host."""
    # resolvers and libraries differ in what they take for a number
    kinds = (Refused, httpx.ConnectError, httpx.InvalidURL)
    with silent_victim() as port, pytest.raises(kinds) as raised:
        get(import_client(settings()), f"http://{host}:{port}/")

    assert host not in PLAIN or getattr(raised.value, "code", "") == "location-refused"


def test_imports_reach_what_the_operator_allows(elsewhere: OriginServer) -> None:
    """An allowed network can be reached on every port, its neighbours cannot."""
    url = elsewhere.add("/x", b"content")

    with silent_victim() as port:
        answers = get(import_client(settings("127.0.0.2/32")), url)
        with pytest.raises(Refused):
            get(import_client(settings("127.0.0.2/32")), f"http://127.0.0.1:{port}/")

    assert answers == [(200, b"content")]


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "100.100.100.200"]
)
def test_metadata_services_are_never_reached(host: str) -> None:
    """What gives a cloud's machines their credentials is refused, whatever is configured."""
    everything = settings("0.0.0.0/0", "::/0")

    for client in (import_client(everything), source_client(everything)):
        with pytest.raises(Refused) as raised:
            get(client, f"http://{host}/latest/meta-data/")
        assert raised.value.code == "location-refused"


def test_every_hop_of_a_redirect_is_judged(elsewhere: OriginServer) -> None:
    """A server that may be reached cannot send an import where it may not go, at any hop."""
    with silent_victim() as port:
        targets = [f"http://127.0.0.1:{port}/", f"http://[::1]:{port}/", f"http://0x7f.1:{port}/"]
        for target in targets:
            second = redirect(elsewhere, "/second", target)
            first = redirect(elsewhere, "/first", second)
            with pytest.raises(Refused):
                get(import_client(settings("127.0.0.2/32")), first)

    assert [request.path for request in elsewhere.log] == ["/first", "/second"] * 3


def test_redirects_stay_with_http(elsewhere: OriginServer) -> None:
    """A redirect to a file, to another protocol, or with a password is refused; so is a long chain."""
    host = elsewhere.url.removeprefix("http://")
    wrong = [
        "file:///etc/passwd",
        "ftp://127.0.0.2/",
        "gopher://127.0.0.2/",
        f"http://a:b@{host}/x",
    ]
    client = settings("127.0.0.2/32")

    for target in wrong:
        with pytest.raises(Refused):
            get(import_client(client), redirect(elsewhere, "/x", target))
    with pytest.raises(OriginFailed):
        get(import_client(client), redirect(elsewhere, "/y", *["/y"] * 20))


def test_a_name_that_changes_reaches_nothing_else(elsewhere: OriginServer) -> None:
    """The address that was judged is the one that is connected to, and each connection is judged."""
    elsewhere.add("/x", b"content")
    names = Names(["127.0.0.2"], ["127.0.0.1"])
    client = import_client(settings("127.0.0.2/32"))
    url = f"http://changing.example:{elsewhere.port}/x"

    with OriginServer("127.0.0.1", elsewhere.port) as victim:
        assert get(client, url, url, resolver=names) == [(200, b"content")] * 2
        assert names.asked == ["changing.example"]  # the second request used the same connection
        with pytest.raises(Refused):
            get(import_client(settings("127.0.0.2/32")), url, resolver=names)
        assert victim.log == []


def test_a_redirect_to_a_changing_name_is_judged_again(elsewhere: OriginServer) -> None:
    """A name that was harmless at the first hop is resolved and judged anew at the next."""
    names = Names(["127.0.0.2"], ["127.0.0.1"])
    with silent_victim() as port:
        redirect(elsewhere, "/x", f"http://changing.example:{port}/")
        url = f"http://changing.example:{elsewhere.port}/x"
        with pytest.raises(Refused):
            get(import_client(settings("127.0.0.2/32")), url, resolver=names)

    assert names.asked == ["changing.example"] * 2


def test_of_mixed_addresses_the_permitted_is_used(elsewhere: OriginServer) -> None:
    """Of a name's addresses those that are refused, or that do not answer, are passed over."""
    elsewhere.add("/x", b"content")
    names = Names(["127.0.0.1", "127.0.0.3", "127.0.0.2"])
    allowed = settings("127.0.0.2/31")

    with OriginServer("127.0.0.1", elsewhere.port) as victim:
        url = f"http://many.example:{elsewhere.port}/x"
        assert get(import_client(allowed), url, resolver=names) == [(200, b"content")]
        assert victim.log == []


def test_sources_may_be_of_this_site(origin: OriginServer) -> None:
    """What the operator configured or an endorser signed may be on this host, and redirect here."""
    origin.add("/x", b"content")

    answers = get(source_client(settings()), redirect(origin, "/r", "/x"))

    assert answers == [(200, b"content")]


def test_a_catalogue_cannot_send_us_to_metadata(origin: OriginServer) -> None:
    """A catalogue that redirects to a metadata service is unreachable, and nothing is asked there."""
    identifier = "MMZu9WvwKIro-rtBQfDk4PsKO7_"
    redirect(origin, f"/metadata/{identifier}", "http://169.254.169.254/latest/")

    async def ask() -> None:
        async with source_client(settings()) as client:
            await read_answers(origin.url, Selection.parse(identifier), client, settings())

    with pytest.raises(OriginFailed) as raised:
        trio.run(ask)

    assert raised.value.code == "catalogue-unreachable"
    assert "not to be reached" in raised.value.message


def test_a_proxy_is_used_for_what_may_be_reached(
    origin: OriginServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's proxy gets requests for the outside, but none for what an import may not reach."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", origin.url)
    origin.add("http://8.8.8.8/x", b"through the proxy")

    assert get(import_client(settings()), "http://8.8.8.8/x") == [(200, b"through the proxy")]
    with pytest.raises(Refused):
        get(import_client(settings()), "http://127.0.0.1:9/x")
    assert len(origin.log) == 1

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    origin.add("/direct", b"direct")
    assert get(source_client(settings()), f"{origin.url}/direct") == [(200, b"direct")]


def test_a_connection_that_nobody_waits_for_is_closed(
    origin: OriginServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is cancelled at the very moment in which a connection comes about leaves none open."""
    url = origin.add("/x", b"content")
    connect = httpcore.TrioBackend.connect_tcp
    opened: list[httpcore.AsyncNetworkStream] = []

    async def ask() -> bool:
        with trio.CancelScope() as scope:

            async def connect_and_cancel(*given: Any, **named: Any) -> httpcore.AsyncNetworkStream:
                opened.append(await connect(*given, **named))
                scope.cancel()
                return opened[-1]

            monkeypatch.setattr(httpcore.TrioBackend, "connect_tcp", connect_and_cancel)
            async with source_client(settings()) as client:
                await client.get(url)
        return scope.cancelled_caught

    assert trio.run(ask)
    assert [stream.get_extra_info("socket").fileno() for stream in opened] == [-1]


@pytest.mark.root
def test_the_internet_is_reached_and_reaches_nothing_here() -> None:
    """Imports reach a public server on web ports; its redirects lead into no network of this site,
    and a public address of this very host counts as this site, too."""
    done = subprocess.run(
        ["unshare", "-n", sys.executable, str(Path(__file__).parents[1] / "support/outside.py")],
        check=False, capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip

    assert done.stdout.splitlines() == [
        "import from outside: 200",
        "import from port 22 outside: location-refused",
        "import from a public address of ours: location-refused",
        "import redirected inside: location-refused",
        "source redirected inside: location-refused",
        "source redirected inside, which is allowed: 200",
        "source inside: 200",
    ], done.stderr
