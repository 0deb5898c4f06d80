"""libiscsi's conformance suite against bare tgt and, beside it, against our raw and overlay disks.

`make test` runs three quick groups; with CRASH_ROUNDS set, as in `make crash`, all of them, and the
same against LIO: an appliance with that back end in a guest with Debian's kernel.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import initiator_guest as inside
from support.appliance import Appliance
from support.conformance import groups, run_group, summary, worse
from support.guests import BareTarget
from support.kernel_guest import KernelGuest
from support.lio_guest import PORT
from support.publishing import Published, publish_image

QUICK = ("Inquiry", "Read16", "ReadCapacity16")
YARDSTICKS = {"raw": "bare-thin", "overlay": "bare"}
"""Raw disks offer UNMAP; what tgt gets wrong there it gets wrong without us."""
EVERY_GROUP = "CRASH_ROUNDS" in os.environ
BASE_BYTES = 12 * 1024**2
DISK_BYTES = 16 * 1024**2
LIMIT_S = 60
EMULATED_LIMIT_S = 180
"""For a guest under software emulation."""

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(7200)]


def test_no_group_is_worse_through_us(tmp_path: Path) -> None:
    """What bare tgt passes with the same features, tgt as we run it passes too."""
    published = publish_image(tmp_path / "published", BASE_BYTES)
    bare_files = [tmp_path / "bare", tmp_path / "bare-thin"]
    for bare_file in bare_files:
        with bare_file.open("wb") as file:
            file.truncate(DISK_BYTES)
    with (
        ExitStack() as kernel,
        BareTarget() as bare,
        Appliance(
            tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
        ) as appliance,
    ):
        names = [bare.export(bare_files[0]), bare.export(bare_files[1], thin=True)]
        portal = f"iscsi://{bare.user}%{bare.secret}@127.0.0.1:{bare.port}"
        urls = {
            "bare": f"{portal}/{names[0]}/1",
            "bare-thin": f"{portal}/{names[1]}/1",
            "raw": _attach(appliance, {"size_bytes": DISK_BYTES}),
            "overlay": _attach(
                appliance, {"reference": published.identifier, "size_bytes": DISK_BYTES}
            ),
        }
        if EVERY_GROUP:
            urls |= kernel.enter_context(_lio(tmp_path, published))
        print(f"{'passed/failed/skipped':24}" + "".join(f"{subject:>12}" for subject in urls))
        wrong = []
        for group in groups() if EVERY_GROUP else QUICK:
            outcomes = {
                subject: run_group(
                    group, url, EMULATED_LIMIT_S if subject.startswith("lio") else LIMIT_S
                )
                for subject, url in urls.items()
            }
            assert all(outcomes.values()), f"no test of {group} ran"
            print(f"{group:24}" + "".join(f"{summary(of):>12}" for of in outcomes.values()))
            wrong += [
                f"{subject}: {group}.{text}"
                for subject, yardstick in YARDSTICKS.items()
                for text in worse(outcomes[subject], outcomes[yardstick])
            ]
    assert wrong == []


@contextmanager
def _lio(folder: Path, published: Published) -> Iterator[dict[str, str]]:
    """Serve a raw disk and an overlay by LIO in a guest; yield their URLs."""
    with KernelGuest(folder, PORT) as guest:
        guest.call(inside.start_appliance, "lio", published.endpoint, published.fingerprint)
        urls = {}
        for form, base in (("raw", ""), ("overlay", f"--reference {published.identifier}")):
            status, disk = guest.call(
                inside.command, "lio", f"disk create {base} --size {DISK_BYTES}"
            )
            assert status == 0, disk
            status, attachment = guest.call(
                inside.command, "lio", f"disk attach {disk['uuid']} --instance {form}"
            )
            assert status == 0, attachment
            there = f"127.0.0.1:{guest.port(PORT)}"
            urls[f"lio {form}"] = attachment["iscsi_url"].replace(f"0.0.0.0:{PORT}", there)
        yield urls
        guest.call(inside.stop_appliance, "lio")


def _attach(appliance: Appliance, request: dict[str, Any]) -> str:
    """Create and attach a disk; return its URL."""
    status, disk = appliance.request("POST", "/v1/disks", request)
    assert status == 201, disk
    path = f"/v1/disks/{disk['uuid']}/attachments"
    status, attachment = appliance.request("POST", path, {"instance": disk["uuid"]})
    assert status == 201, attachment
    url: str = attachment["iscsi_url"]
    return url
