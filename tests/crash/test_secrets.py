"""Secrets of attachments and of accounts in use: where they are found, and where they must not be."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.appliance import Appliance, free_port
from support.publishing import publish_image

MIB = 1024**2
SETTLE_TIMEOUT_S = 60

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(180)]

# Becomes another user, then asks; connecting is what tells the kernel who that is.
ASK = """
import http.client, json, os, socket, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
answers = []
for path in sys.argv[1:]:
    connection = http.client.HTTPConnection("api")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect("api.sock")
    connection.request("GET", path)
    answer = connection.getresponse()
    answers.append([path, answer.status, answer.read().decode()])
    connection.close()
print(json.dumps(answers))
"""


def test_secrets_stay_where_they_belong(tmp_path: Path) -> None:
    """No log, event, operation, process, file that others can read, database, or answer to another
    user has a CHAP secret or the key to them, while a guest is attached and its disk moves, after
    wrong logins and after restarts of everything; only its own file has a secret."""
    published = publish_image(tmp_path / "published", 4 * MIB)
    with Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint,
        extra='log_level = "debug"',
    ) as appliance:  # fmt: skip
        launch = _launch(appliance, published.identifier)
        attachments = [*launch["attachments"], _moved(appliance, launch)]
        secrets = {item["chap"]["secret"] for item in attachments}
        assert len(secrets) == len(attachments) == 4
        with subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-S", "-nodefaults", "-display", "none",
             *launch["qemu_args"]],
            stdin=subprocess.DEVNULL,
        ) as guest:  # fmt: skip
            try:
                _wait_for_sessions(appliance, len(launch["attachments"]))
                _log_in_wrongly(attachments[0])
                for program in ("stratocache.fs.blockd", "tgtd -f", "stratocache.api.server"):
                    for pid in appliance.pids(program):
                        os.kill(pid, signal.SIGKILL)
                _wait_for_sessions(appliance, len(launch["attachments"]))
                assert guest.poll() is None

                assert _processes_with(secrets) == []
                answers = _answers_to_nobody(appliance, launch, published.identifier)
                assert [path for path, _, text in answers if _has(text.encode(), secrets)] == []
                assert any(item["id"] in text for item in attachments for _, _, text in answers)
            finally:
                guest.kill()
        files = list(_files(tmp_path))
        holding = {path for path in files if _has(path.read_bytes(), secrets)}
        assert _readable_by_others(holding) == []
        assert _readable_by_others(files)  # or nothing was compared
        expected = {appliance.run_dir / "secrets" / item["id"] for item in attachments}
        assert holding == expected
        key = appliance.state_dir / "secrets.key"
        assert {"state.db", "state.db-wal"} <= {path.name for path in files}
        assert [path for path in files if key.read_bytes() in path.read_bytes()] == [key]
        assert _readable_by_others([key]) == []
        new = attachments[-1]
        complete = f"/v1/disks/{new['disk_uuid']}/attachments/{new['id']}/complete"
        assert appliance.request("POST", complete, {})[0] == 200
        assert appliance.request("DELETE", f"/v1/launches/{launch['instance']}")[0] == 204
        assert not any(_has(path.read_bytes(), secrets) for path in _files(tmp_path, "secrets"))
    assert not _has(appliance.log.read_bytes(), secrets)


def test_secrets_of_accounts_stay_where_they_belong(tmp_path: Path) -> None:
    """No log, event, process, file, database or answer to another user has a password, a token or the
    cookie of a session, right or wrong, after restarts of who knows them; the key of TLS and the token
    for the first account are for root alone, and that token goes with its use."""
    port = free_port()
    with Appliance(
        tmp_path / "appliance", endpoint="http://127.0.0.1:9",
        extra=f'log_level = "debug"\napi.address = "127.0.0.1"\napi.port = {port}\napi.workers = 1',
    ) as appliance:  # fmt: skip
        key = appliance.state_dir / "tls/web.key"
        first = appliance.state_dir / "first-token"
        _wait_for(first.exists)
        assert first.stat().st_mode & 0o777 == key.stat().st_mode & 0o777 == 0o600
        secrets = _use_accounts(appliance, port)
        assert not first.exists()
        for program in ("stratocache.api.web_server", "stratocache.api.server"):
            for pid in appliance.pids(program):
                os.kill(pid, signal.SIGKILL)
        _wait_for(appliance.ready)

        assert _processes_with(secrets) == []
        paths = [
            "/v1/accounts", "/v1/accounts/jane", "/v1/accounts/jane/tokens", "/v1/audit",
            "/v1/session", "/v1/events", "/v1/operations", "/v1/overview", "/metrics", "/accounts",
        ]  # fmt: skip
        answers = _answers_of(appliance, paths)
        own = [appliance.exchange("GET", path)[1] for path in paths]
        assert not any(_has(text.encode(), secrets) for _, _, text in answers)
        assert not any(_has(content, secrets) for content in own)
        assert b"jane" in own[3]
    files = list(_files(tmp_path))
    assert {"state.db", "serve.log"} <= {path.name for path in files}
    assert [path for path in files if _has(path.read_bytes(), secrets)] == []
    assert _readable_by_others([key]) == []


def _use_accounts(appliance: Appliance, port: int) -> set[str]:
    """Make an account, come in by every way, and try wrong ones; return all that is secret."""
    words = {"password": "correct horse 4711", "wrong": "incorrect horse 4712"}
    wanted = {"name": "jane", "role": "admin", "password": words["password"]}
    assert appliance.request("POST", "/v1/accounts", wanted)[0] == 201
    scopes = {"description": "a launcher's", "scopes": ["read", "disks"]}
    status, token = appliance.request("POST", "/v1/accounts/jane/tokens", scopes)
    assert status == 201, token
    context = ssl.create_default_context(cafile=str(appliance.state_dir / "tls/web.pem"))
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, timeout=60) as web:
        logged_in = web.post("/v1/session", json={"name": "jane", "password": words["password"]})
        assert logged_in.status_code == 201, logged_in.text
        cookie = logged_in.headers["set-cookie"].partition(";")[0].partition("=")[2]
        web.cookies.clear()
        wrong = web.post("/v1/session", json={"name": "jane", "password": words["wrong"]})
        assert wrong.status_code == 401
        forged = "sct_" + "x" * 43
        for bearer, expected in ((token["token"], 201), (forged, 401)):
            made = web.post(
                "/v1/disks?wait=60", json={"size_bytes": MIB},
                headers={"Authorization": f"Bearer {bearer}"},
            )  # fmt: skip
            assert made.status_code == expected, made.text
        shown = web.get(
            f"/v1/disks?token={forged}", headers={"Cookie": f"__Host-stratocache={cookie}"}
        )
        assert shown.status_code == 400
    return {*words.values(), token["token"], cookie, forged}


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _launch(appliance: Appliance, reference: str) -> Any:
    """Launch with a data disk that everybody may see and a shared image; return all details."""
    request = {"size_bytes": MIB, "visibility": "public"}
    status, disk = appliance.request("POST", "/v1/disks", request)
    assert status == 201, disk
    body = {
        "reference": reference,
        "instance": "vm1",
        "disks": [disk["uuid"]],
        "readonly": [reference],
    }
    status, launch = appliance.request("POST", "/v1/launches", body)
    assert status == 201, launch
    return launch


def _moved(appliance: Appliance, launch: dict[str, Any]) -> Any:
    """Begin a migration of the data disk; return the second attachment."""
    (source,) = (item for item in launch["attachments"] if item["role"] == "disk")
    path = f"/v1/disks/{source['disk_uuid']}/attachments/{source['id']}/migrate"
    status, new = appliance.request("POST", path, {"instance": launch["instance"]})
    assert status == 201, new
    return new


def _log_in_wrongly(attachment: dict[str, Any]) -> None:
    secret = attachment["chap"]["secret"]
    url = attachment["iscsi_url"].replace(secret, secret[::-1])
    done = subprocess.run(["iscsi-inq", url], check=False, capture_output=True, timeout=30)
    assert done.returncode != 0


def _wait_for_sessions(appliance: Appliance, wanted: int) -> None:
    environment = {**os.environ, "TGT_IPC_SOCKET": str(appliance.run_dir / "tgtd")}
    command = ["tgtadm", "--lld", "iscsi", "--op", "show", "--mode", "target"]
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        shown = subprocess.run(
            command, env=environment, check=False, capture_output=True, text=True
        ).stdout
        if shown.count("Initiator: ") >= wanted and appliance.ready():
            return
        assert time.monotonic() < deadline, shown
        time.sleep(0.1)


def _has(content: bytes, secrets: Iterable[str]) -> bool:
    return any(secret.encode() in content for secret in secrets)


def _processes_with(secrets: Iterable[str]) -> list[str]:
    """Return the processes of the host that show a secret in their arguments or environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                shown = (folder / name).read_bytes()
            except OSError:
                continue
            if _has(shown, secrets):
                found.append(f"{folder / name}: {shown!r}")
    return found


def _answers_to_nobody(
    appliance: Appliance, launch: dict[str, Any], image: str
) -> list[tuple[str, int, str]]:
    """Let another user, who may connect, ask for everything."""
    disks = [item["disk_uuid"] for item in launch["attachments"] if item["disk_uuid"]]
    operations = appliance.request("GET", "/v1/operations")[1]["operations"]
    assert operations
    paths = [
        "/v1", "/v1/images", f"/v1/images/{image}", "/v1/disks", "/v1/launches", "/v1/operations",
        f"/v1/launches/{launch['instance']}", "/healthz", "/readyz", "/metrics", "/openapi.json",
        *(f"/v1/disks/{uuid}" for uuid in disks),
        *(f"/v1/disks/{uuid}/attachments" for uuid in disks),
        *(f"/v1/operations/{operation['id']}" for operation in operations),
    ]  # fmt: skip
    answers = _answers_of(appliance, paths)
    assert 200 in {status for _, status, _ in answers}
    return answers


def _answers_of(appliance: Appliance, paths: Sequence[str]) -> list[tuple[str, int, str]]:
    """Let another user ask for some paths."""
    (appliance.run_dir / "api.sock").chmod(0o666)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ASK, *paths], cwd=appliance.run_dir,
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return [(path, status, text) for path, status, text in json.loads(done.stdout)]


def _files(folder: Path, *below: str) -> Iterator[Path]:
    """Yield the regular files of the appliance, without those of its mount."""
    for parent, names, files in os.walk(folder):
        if "blocks" in names:
            names.remove("blocks")
        for path in (Path(parent) / name for name in files):
            if path.is_file() and not path.is_symlink() and set(below) <= set(path.parts):
                yield path


def _readable_by_others(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.stat().st_mode & 0o044]
