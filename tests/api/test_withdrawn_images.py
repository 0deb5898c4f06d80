"""A whole appliance whose catalogue takes an image back: what is refused, what goes on, who is told."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance
from support.documents import EMAIL, make_endorser, shelve, signed_document, unsigned_document

from stratocache.cache import publication
from stratocache.cache.identifier import encode

pytestmark = pytest.mark.root

IMAGE = hashlib.shake_256(b"an image that is taken back").digest(1024**2 + 512)
OTHER = hashlib.shake_256(b"an image that nobody has fetched").digest(4096)
NOW = publication.now()
OFTEN = "[recheck]\ninterval_s = 0.2\nconfirm_s = 0.2\npause_s = 0.05\n"
_WAIT_S = 60


@dataclass(frozen=True)
class Site:
    """An appliance and the folder that is its catalogue."""

    appliance: Appliance
    folder: Path

    def publish(self, image: bytes, created: int, **fields: Any) -> str:
        """Offer an image, or take it back; return its identifier. Later words are greater."""
        at = NOW - timedelta(days=1) + timedelta(minutes=created)
        identifier = encode(hashlib.sha1(image).hexdigest())
        path = self.folder / identifier
        path.write_bytes(image)
        unsigned = unsigned_document(image, locations=[path.as_uri()], **fields)
        document = signed_document(make_endorser(), unsigned, created=at)
        shelve(self.folder / "entries", document, identifier, EMAIL, at)
        return identifier


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site that asks its catalogue all the time, for all tests of this module."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "entries").mkdir()
    with Appliance(
        folder / "appliance", endpoint=(folder / "entries").as_uri(),
        fingerprint=make_endorser().fingerprint, extra=OFTEN,
    ) as appliance:  # fmt: skip
        yield Site(appliance, folder)


def _become(site: Site, identifier: str, state: str) -> dict[str, Any]:
    """Wait until an image is in a state; return how it is shown."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        shown: dict[str, Any] = site.appliance.json("image", "show", identifier)
        if shown["state"] == state:
            return shown
        assert time.monotonic() < deadline, f"{shown['state']}, not {state}"


def _refused(site: Site, code: str, *arguments: str) -> str:
    """Run a command that policy refuses; return the sentence."""
    done = site.appliance.run(*arguments, "--json")
    assert done.returncode == 5, done.stderr
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["code"] == code
    sentence: str = told["error"]
    return sentence


def test_what_is_taken_back_is_refused_and_what_runs_goes_on(site: Site) -> None:
    """No launch and no clone of a withdrawn image is made; its VM, its disks, its bytes and what is
    shown of them stay; listed again it is launched again."""
    appliance = site.appliance
    image = site.publish(IMAGE, 0)
    boot = appliance.json("launch", image, "--instance", "vm1")["boot"]["disk_uuid"]
    disk = appliance.json("disk", "create", "--reference", image, "--tag", "kept")["uuid"]
    site.publish(IMAGE, 1, deprecated="holes everywhere")

    shown = _become(site, image, "withdrawn")

    assert "holes everywhere" in shown["withdrawn_because"]
    assert "holes everywhere" in _refused(
        site, "image-withdrawn", "launch", image, "--instance", "vm2"
    )
    for path, body in (
        ("/v1/launches", {"reference": image, "instance": "vm3"}),
        ("/v1/launches", {"reference": image, "instance": "vm4", "readonly": [image]}),
        ("/v1/disks", {"reference": image}),
        ("/v1/images?wait=60", {"reference": image}),
    ):
        status, problem = appliance.request("POST", path, body)
        assert (status, problem["code"]) == (403, "image-withdrawn"), path
    assert {item["uuid"]: item["attached_to"] for item in shown["disks"]} == {
        boot: ["vm1"],
        disk: [],
    }
    assert f"disk {disk} (kept): " in appliance.run("image", "show", image).stdout
    assert "withdrawn" in appliance.run("image", "ls").stdout
    [planned] = appliance.json("cache", "plan")["images"]
    assert planned["state"] == "withdrawn" and "base of disks" in planned["kept_because"]
    assert (appliance.run_dir / "blocks" / "images" / image).read_bytes() == IMAGE
    appliance.json("disk", "attach", disk, "--instance", "vm1")

    site.publish(IMAGE, 2)
    appliance.json("image", "fetch", image)
    assert appliance.json("launch", image, "--instance", "vm2")["state"] == "active"


def test_unproven_images_are_launched_only_where_the_policy_says_so(site: Site) -> None:
    """`--provisional` is refused before anything is fetched; without it the launch waits and is
    made."""
    other = site.publish(OTHER, 0)
    command = ("launch", other, "--instance", "vm9")
    sentence = _refused(site, "provisional-refused", *command, "--provisional")
    assert "catalogues.stratuslab.endorsers" in sentence
    assert other not in [item["id"] for item in site.appliance.json("image", "ls")["images"]]
    assert site.appliance.json(*command)["state"] == "active"
    assert _become(site, other, "verified")["disk_count"] == 1
