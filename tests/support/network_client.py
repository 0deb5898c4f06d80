"""Who comes to the API over the network, in tests: the application itself, or its real process."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from falcon import testing

from stratocache.api.passwords import hash_password
from stratocache.cache.configuration import Configuration
from stratocache.fs.accounts import AccountRequest, create_account
from stratocache.fs.listener import listen_tcp
from stratocache.fs.records import Role
from stratocache.fs.state import Database
from support.api_daemon import ROOT, Api

HOST = "127.0.0.1"
PASSWORD = "correct horse battery"
_END_TIMEOUT_S = 30
_START_TIMEOUT_S = 60


@dataclass
class Stranger:
    """Sends requests to the application as from the network, with headers and cookies of its own."""

    client: testing.TestClient
    headers: dict[str, str] = field(default_factory=dict)
    address: str = "192.0.2.7"
    protocol: str = "https"

    def __call__(self, method: str, path: str, body: Any = None, **options: Any) -> testing.Result:
        """Send a request; `body` is sent as JSON, unless it is bytes."""
        if body is not None:
            options["body" if isinstance(body, bytes) else "json"] = body
        headers = {**self.headers, **options.pop("headers", {})}
        result: testing.Result = self.client.simulate_request(
            method, path, headers=headers, remote_addr=self.address, protocol=self.protocol,
            **options,
        )  # fmt: skip
        return result

    def with_token(self, token: str) -> "Stranger":
        """Return one that sends a token."""
        headers = {**self.headers, "Authorization": f"Bearer {token}"}
        return Stranger(self.client, headers, self.address, self.protocol)


@cache
def password_hash() -> str:
    """Return what is stored of `PASSWORD`; making it takes a while."""
    return hash_password(PASSWORD)


def add_account(db: Database, name: str, role: Role = "user", **fields: Any) -> None:
    """Make an account whose password is `PASSWORD`."""
    wanted = AccountRequest(name, role, password_hash=password_hash(), **fields)
    create_account(db, ROOT, wanted)


def stranger(api: Api) -> Stranger:
    """Return somebody whom nobody knows."""
    return Stranger(api.client)


def log_in(somebody: Stranger, name: str, password: str = PASSWORD) -> Stranger:
    """Return the browser of somebody who has logged in, and whose pages send the CSRF token."""
    answer = somebody("POST", "/v1/session", {"name": name, "password": password})
    assert answer.status_code == 201, answer.text
    (cookie,) = answer.cookies.values()
    headers = {"Cookie": f"{cookie.name}={cookie.value}", "X-CSRF-Token": answer.json["csrf_token"]}
    return Stranger(somebody.client, headers, somebody.address, somebody.protocol)


@dataclass
class WebProcess:
    """The real process that serves the network."""

    process: subprocess.Popen[bytes]
    configuration: Configuration
    log: Path

    @property
    def url(self) -> str:
        """Where it is, without a trailing slash."""
        api = self.configuration.api
        return f"{'https' if api.tls else 'http'}://{HOST}:{api.port}"

    def wait_for_log(self, text: str) -> str:
        """Return the log once it has a text."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while text not in (found := self.log.read_text()):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found


@contextmanager
def serving_network(configuration: Configuration) -> Iterator[WebProcess]:
    """Run the real process on `api.port` until the end of the block."""
    path = configuration.run_dir / "web.json"
    path.write_text(configuration.model_dump_json())
    log = configuration.run_dir / "web.log"
    reports, ready = os.pipe()
    with (
        listen_tcp(HOST, configuration.api.port) as listener,
        open(reports, "rb") as pipe,
        log.open("wb") as output,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "stratocache.api.web_server", "--config-json", str(path),
             "--listen-fd", str(listener.fileno()), "--ready-fd", str(ready)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            pass_fds=(listener.fileno(), ready),
        )  # fmt: skip
        os.close(ready)
        assert pipe.read(1) == b"R", log.read_text()
    try:
        yield WebProcess(process, configuration, log)
    finally:
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        finally:
            process.kill()


def speak(port: int, text: bytes) -> bytes:
    """Send bytes over a plain connection; return what comes until the other side closes it."""
    with socket.create_connection((HOST, port), timeout=_END_TIMEOUT_S) as connection:
        connection.sendall(text)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found
