"""schemathesis plays the API of a whole appliance by its own description: as an administrator, as a
user, and as nobody. No answer is a server's fault or other than described; nothing is left broken.

`make test` plays each route a few times; `make crash` plays for API_FUZZ_SECONDS (1200), with
sequences of requests that build on each other.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.appliance import Appliance, free_port
from support.network_client import PASSWORD
from support.oidc_issuer import AUDIENCE, Issuer
from support.publishing import publish_image

SECONDS = float(os.environ.get("API_FUZZ_SECONDS", "0"))
"""In all; 0 = a few examples of each route."""
WAIT_S_MAX = 0.5
SEED = os.environ.get("CRASH_SEED", "1" if SECONDS == 0 else "")
EXPECTED = ["2xx", "3xx", "4xx", "502", "507"]
"""Another's server that fails (502) and space that is full (507) are answers, not faults of ours."""
EXAMPLES = {"nobody": 1, "user": 1, "admin": 2}
ROLES = {"nobody": None, "user": "user", "admin": "admin"}
ACCOUNTS = ("user", "spare", "spent")
"""That there are; players make others."""
ISSUER = "https://issuer.example.org"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "allow_header_conformance",
)  # fmt: skip

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600 + 3 * SECONDS)]


class World:
    """An appliance on the loopback network with something of everything, and tokens to use it.

    Who plays is whom an issuer of OpenID Connect names: no account, token or session that is taken
    away is its own. `user` has an account too, for its disks; `admin` has none, and the API lets it
    make none that is less than it is.
    """

    def __init__(self, root: Path) -> None:
        published = publish_image(root / "market", 4 * 1024**2)
        self.port = free_port()
        self.appliance = Appliance(
            root / "a", endpoint=published.endpoint, fingerprint=published.fingerprint,
            extra=f'[api]\naddress = "127.0.0.1"\nport = {self.port}\ntls = false\n'
            f"requests_per_s = 0\n{_believe(root / 'keys.json')}",
        )  # fmt: skip
        self.image = published.identifier
        self.tokens = _tokens(root / "keys.json")
        self.token_ids: list[str] = []
        self.disks: list[str] = []
        self.snapshots: list[str] = []
        self.attachments: list[str] = []
        self.operations: list[str] = []

    def populate(self) -> None:
        """Make accounts with tokens, an image, disks, snapshots, attachments and a launch."""
        for name in ACCOUNTS:
            self.post("/v1/accounts", {"name": name, "password": PASSWORD})
            wanted = {"description": "to play with", "scopes": ["read"]}
            self.token_ids.append(self.post(f"/v1/accounts/{name}/tokens", wanted)["id"])
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
            "name": list(ACCOUNTS), "token_id": self.token_ids,
        }  # fmt: skip
        for operations in document["paths"].values():
            for operation in operations.values():
                for parameter in operation.get("parameters", ()):
                    if parameter["in"] == "path" and parameter["name"] in known:
                        some = {"type": "string", "enum": known[parameter["name"]]}
                        parameter["schema"] = {"anyOf": [some, parameter["schema"]]}
                    elif parameter["name"] == "wait":
                        parameter["schema"]["maximum"] = WAIT_S_MAX
        schemas = document["components"]["schemas"]
        for schema, name, values in (
            ("ImageFetch", "reference", [self.image]),
            ("SessionCreation", "name", list(ACCOUNTS)),
            ("SessionCreation", "password", [PASSWORD]),
            ("AccountChange", "current_password", [PASSWORD]),
        ):
            fields = schemas[schema]["properties"]
            fields[name] = {"anyOf": [{"type": "string", "enum": values}, fields[name]]}
        return document

    def who_is(self, player: str) -> Any:
        """Return what the API says of a player, None when it knows nobody."""
        token = self.tokens.get(player)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        answer = httpx.get(f"http://127.0.0.1:{self.port}/v1/session", headers=headers)
        return answer.json().get("role")

    def sweep(self) -> None:
        """Delete the accounts that players have made; who owns something stays."""
        for account in self.request("GET", "/v1/accounts?limit=1000")["accounts"]:
            if account["name"] not in ACCOUNTS:
                status, _ = self.appliance.request("DELETE", f"/v1/accounts/{account['name']}")
                assert status in (204, 409)


def _believe(keys: Path) -> str:
    return (
        f'[[api.oidc]]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\njwks_file = "{keys}"\n'
        'role_claim = "groups"\nroles = { "admins" = "admin" }\n'
    )


def _tokens(keys: Path) -> dict[str, str]:
    """Write an issuer's keys; return tokens that last for as long as is played."""
    issuer = Issuer()
    issuer.url = ISSUER
    keys.write_bytes(issuer.key_set())
    end = int(time.time() + 3600 + 3 * SECONDS)
    return {
        "user": issuer.token("user", exp=end),
        "admin": issuer.token("director-of-players", exp=end, groups=["admins"]),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One appliance for all who play."""
    made = World(tmp_path_factory.mktemp("f"))
    with made.appliance:
        made.populate()
        yield made


@pytest.mark.parametrize("who", ["nobody", "user", "admin"])
def test_every_answer_is_as_described(world: World, tmp_path: Path, who: str) -> None:
    """Whatever is sent, every answer is described, none is a server error, and one is who one was."""
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
    assert world.who_is(who) == ROLES[who]
    world.sweep()


def test_nothing_is_left_broken(world: World) -> None:
    """After all that the appliance is ready, and its checks find nothing."""
    assert world.appliance.ready()
    for command in ("disk", "cache"):
        checked = world.appliance.run(command, "check")
        assert checked.returncode == 0, checked.stdout + checked.stderr
