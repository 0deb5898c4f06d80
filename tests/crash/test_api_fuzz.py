"""schemathesis plays the API of a whole appliance by its own description: as an administrator, as a
user, and as nobody. No answer is a server's fault or other than described; nothing is left broken.

`make test` plays each route a few times; `make crash` plays for API_FUZZ_SECONDS (1200), with
sequences of requests that build on each other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance, free_port
from support.publishing import publish_image

SECONDS = float(os.environ.get("API_FUZZ_SECONDS", "0"))
"""In all; 0 = a few examples of each route."""
WAIT_S_MAX = 0.5
SEED = os.environ.get("CRASH_SEED", "1" if SECONDS == 0 else "")
EXPECTED = ["2xx", "3xx", "4xx", "502", "507"]
"""Another's server that fails (502) and space that is full (507) are answers, not faults of ours."""
EXAMPLES = {"nobody": 1, "user": 1, "admin": 2}
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "allow_header_conformance",
)  # fmt: skip

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600 + 3 * SECONDS)]


class World:
    """An appliance on the loopback network with something of everything, and tokens to use it."""

    def __init__(self, root: Path) -> None:
        published = publish_image(root / "market", 4 * 1024**2)
        self.port = free_port()
        self.appliance = Appliance(
            root / "a", endpoint=published.endpoint, fingerprint=published.fingerprint,
            extra=f'[api]\naddress = "127.0.0.1"\nport = {self.port}\ntls = false\n'
            "requests_per_s = 0\n",
        )  # fmt: skip
        self.image = published.identifier
        self.tokens: dict[str, str] = {}
        self.disks: list[str] = []
        self.snapshots: list[str] = []
        self.attachments: list[str] = []
        self.operations: list[str] = []

    def populate(self) -> None:
        """Make accounts with tokens, an image, disks, snapshots, attachments and a launch."""
        for name, role in (("admin", "admin"), ("user", "user")):
            self.post("/v1/accounts", {"name": name, "role": role})
            scopes = ["read", "launch", "disks", "images", "admin"]
            wanted = {"description": "to play", "scopes": scopes}
            made = self.post(f"/v1/accounts/{name}/tokens", wanted)
            self.tokens[name] = made["token"]
        self.operations.append(self.post("/v1/references?wait=30", {"reference": self.image})["id"])
        self.post("/v1/images?wait=60", {"reference": self.image})
        for owner in ("root", "user", "user"):
            disk = self.post("/v1/disks", {"size_bytes": 2**20})["uuid"]
            self.snapshots.append(self.post(f"/v1/disks/{disk}/snapshots", {})["id"])
            self.request("PATCH", f"/v1/disks/{disk}", {"owner": owner})
            body = {"instance": f"vm-{len(self.disks)}", "lease_s": 3600}
            if len(self.disks) < 2:
                self.attachments.append(self.post(f"/v1/disks/{disk}/attachments", body)["id"])
            self.disks.append(disk)
        self.post("/v1/launches?wait=60", {"reference": self.image, "instance": "played"})

    def post(self, path: str, body: Any) -> Any:
        """Ask for something as root; it must be done."""
        return self.request("POST", path, body)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Ask as root on the Unix socket; it must be done."""
        status, answer = self.appliance.request(method, path, body)
        assert 200 <= status < 300, (method, path, answer)
        return answer

    def description(self) -> dict[str, Any]:
        """Return what the appliance says of itself, in which addresses name what is there as often
        as what is not, and nobody waits long."""
        document: dict[str, Any] = self.request("GET", "/openapi.json")
        known = {
            "uuid": self.disks, "snapshot_id": self.snapshots, "attachment_id": self.attachments,
            "image_id": [self.image], "operation_id": self.operations, "instance": ["played"],
        }  # fmt: skip
        for operations in document["paths"].values():
            for operation in operations.values():
                for parameter in operation.get("parameters", ()):
                    if parameter["in"] == "path" and parameter["name"] in known:
                        some = {"type": "string", "enum": known[parameter["name"]]}
                        parameter["schema"] = {"anyOf": [some, parameter["schema"]]}
                    elif parameter["name"] == "wait":
                        parameter["schema"]["maximum"] = WAIT_S_MAX
        reference = document["components"]["schemas"]["ImageFetch"]["properties"]["reference"]
        document["components"]["schemas"]["ImageFetch"]["properties"]["reference"] = {
            "anyOf": [{"type": "string", "enum": [self.image]}, reference]
        }
        return document


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One appliance for all who play."""
    made = World(tmp_path_factory.mktemp("f"))
    with made.appliance:
        made.populate()
        yield made


@pytest.mark.parametrize("who", ["nobody", "user", "admin"])
def test_every_answer_is_as_described(world: World, tmp_path: Path, who: str) -> None:
    """Whatever is sent, every answer is described, and none is a server error."""
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(world.description()))
    configuration = tmp_path / "schemathesis.toml"
    statuses = json.dumps(EXPECTED)
    configuration.write_text(f"[checks.not_a_server_error]\nexpected-statuses = {statuses}\n")
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(configuration),
        "run", str(document), "--url", f"http://127.0.0.1:{world.port}", "--no-color",
        "--checks", ",".join(CHECKS), "--continue-on-failure", "--request-timeout", "120",
        "--generation-database", "none", "--suppress-health-check", "all", "--warnings", "off",
        # who loses its own name or token plays on as nobody
        "--exclude-path-regex", "^/v1/(session|accounts/)",
    ]  # fmt: skip
    if who in world.tokens:
        command += ["--header", f"Authorization: Bearer {world.tokens[who]}"]
    if SEED:
        command += ["--seed", SEED]
    if SECONDS:
        # one thread: CPython 3.11 parses no code in two at once, as Hypothesis does here
        command += ["--max-time", str(int(SECONDS / 3)), "--workers", "1"]
    else:
        command += ["--phases", "fuzzing", "--max-examples", str(EXAMPLES[who]), "--no-shrink"]
    played = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path,
        timeout=540 + 2 * SECONDS,
    )  # fmt: skip
    print(played.stdout[-1500:])

    assert played.returncode == 0, played.stdout[-20_000:] + played.stderr[-2000:]
    assert "Traceback" not in world.appliance.log.read_text()


def test_nothing_is_left_broken(world: World) -> None:
    """After all that the appliance is ready, and its checks find nothing."""
    assert world.appliance.ready()
    for command in ("disk", "cache"):
        checked = world.appliance.run(command, "check")
        assert checked.returncode == 0, checked.stdout + checked.stderr
