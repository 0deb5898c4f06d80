"""A real appliance that serves the network: from its first start to a first disk."""

import contextlib
import re
import ssl
import time
from pathlib import Path

import httpx
import pytest
from support.appliance import Appliance, free_port
from support.network_client import HOST, PASSWORD

pytestmark = [pytest.mark.root, pytest.mark.slow]

TIMEOUT_S = 90


def test_appliance_begins_on_the_network(tmp_path: Path) -> None:
    """`serve` says a fingerprint and a token; with these alone an administrator makes an account,
    logs in over TLS and creates a disk, which the host sees too."""
    port = free_port()
    appliance = Appliance(
        tmp_path / "a", endpoint="http://127.0.0.1:9",
        extra=f'[api]\naddress = "{HOST}"\nport = {port}\n',
    )  # fmt: skip
    appliance.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (token := re.search(r"sct_[\w-]{43}", log := appliance.log.read_text())):
            assert time.monotonic() < deadline, log
            time.sleep(0.05)
        fingerprint = re.search(r"sha256:([0-9a-f]{64})", log)
        assert fingerprint is not None
        context = ssl.create_default_context(cafile=str(appliance.state_dir / "tls" / "web.pem"))
        with httpx.Client(
            base_url=f"https://{HOST}:{port}", verify=context, timeout=TIMEOUT_S
        ) as browser:
            wanted = {"name": "jane", "role": "admin", "password": PASSWORD}
            bearer = {"Authorization": f"Bearer {token[0]}"}
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    made = browser.post("/v1/accounts", json=wanted, headers=bearer)
                    break
                assert time.monotonic() < deadline, appliance.log.read_text()
            assert made.status_code == 201, made.text
            session = browser.post("/v1/session", json={"name": "jane", "password": PASSWORD})
            browser.headers["Cookie"] = session.headers["set-cookie"].partition(";")[0]
            browser.headers["X-CSRF-Token"] = session.json()["csrf_token"]
            assert browser.get("/v1").json()["tls_certificate_sha256"] == fingerprint[1]
            disk = browser.post("/v1/disks", json={"size_bytes": 2**20})
            assert disk.status_code == 201, disk.text

        status, seen = appliance.request("GET", f"/v1/disks/{disk.json()['uuid']}")
        assert (status, seen["owner"]) == (200, "jane")
        network = appliance.run("doctor", "--json")
        assert f"{HOST}, port {port}" in network.stdout
    finally:
        appliance.stop()
