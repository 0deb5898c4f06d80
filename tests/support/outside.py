"""Asks servers inside and outside of a network namespace of our own, and prints the answers.

Run by `unshare -n`. This side has the public address 8.8.8.1, the other, a namespace behind a pair
of virtual interfaces, 8.8.8.2: to whoever asks here that is the Internet.
"""

import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network

import httpx
import trio

from stratocache.cache.configuration import FetchSettings
from stratocache.cache.errors import StratocacheError
from stratocache.cache.outgoing import import_client, respond, source_client
from support.origins import Fault, OriginServer, Resource

OURS, THEIRS = "8.8.8.1", "8.8.8.2"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)


def serve_outside(port: int) -> None:
    """Serve a file and a redirect to a port of the other side's loopback until the input ends."""
    with OriginServer(THEIRS, 80) as web, OriginServer(THEIRS, 22):
        web.add("/file", b"outside")
        inside = {"Location": f"http://127.0.0.1:{port}/file"}
        web.add("/redirect", Resource(b"", faults=deque([Fault(302, inside)] * 3)))
        print("ready", flush=True)
        sys.stdin.read()


@contextmanager
def _outside(port: int) -> Iterator[None]:
    """Have a server on the other side of a pair of interfaces."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "inside0", "type", "veth", "peer", "name", "outside0")
    _run("ip", "addr", "add", f"{OURS}/24", "dev", "inside0")
    _run("ip", "link", "set", "inside0", "up")
    other = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", 'echo up; read go; exec "$@"', "sh",
         sys.executable, __file__, str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == "up\n"
        _run("ip", "link", "set", "outside0", "netns", str(other.pid))
        enter = ("nsenter", "-t", str(other.pid), "-n", "ip")
        _run(*enter, "addr", "add", f"{THEIRS}/24", "dev", "outside0")
        _run(*enter, "link", "set", "outside0", "up")
        other.stdin.write("go\n")
        other.stdin.flush()
        assert other.stdout.readline() == "ready\n"
        yield
        other.stdin.close()


def _report(what: str, client: httpx.AsyncClient, url: str) -> None:
    async def ask() -> str:
        async with client:
            try:
                async with respond(client, url, {}, httpx.Timeout(20)) as response:
                    await response.aread()
                    return str(response.status_code)
            except StratocacheError as error:
                return error.code

    print(f"{what}: {trio.run(ask)}")


def ask_from_inside() -> None:
    """Ask whom one may and whom one may not."""
    closed, opened = FetchSettings(), FetchSettings(allowed_networks=(ip_network("127.0.0.0/8"),))
    with OriginServer() as inside, _outside(inside.port):
        here = inside.add("/file", b"inside")
        web = f"http://{THEIRS}"
        _report("import from outside", import_client(closed), f"{web}/file")
        _report("import from port 22 outside", import_client(closed), f"{web}:22/file")
        with OriginServer(OURS) as ours:
            url = ours.add("/file", b"ours")
            _report("import from a public address of ours", import_client(closed), url)
        _report("import redirected inside", import_client(closed), f"{web}/redirect")
        _report("source redirected inside", source_client(closed), f"{web}/redirect")
        allowed = source_client(opened)
        _report("source redirected inside, which is allowed", allowed, f"{web}/redirect")
        _report("source inside", source_client(closed), here)
        assert len(inside.log) == 2


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve_outside(int(sys.argv[1]))
    else:
        ask_from_inside()
