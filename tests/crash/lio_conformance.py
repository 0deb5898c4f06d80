"""libiscsi's conformance suite against LIO as we use it and, beside it, as the kernel comes.

An hour of software emulation, so only `make crash` names this file: Debian's kernel runs in a guest
with an appliance whose back end is LIO, and with two targets that nobody but configfs has made.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import initiator_guest as inside
from support import lio_guest
from support.conformance import compare, groups
from support.kernel_guest import KernelGuest
from support.lio_guest import PORT
from support.publishing import publish_image

YARDSTICKS = {"LIO raw": "bare LIO thin", "LIO overlay": "bare LIO"}
"""Raw disks offer UNMAP."""
BASE_BYTES = 12 * 1024**2
DISK_BYTES = 16 * 1024**2
LIMIT_S = 180

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(10800)]


@pytest.fixture
def urls(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Logical units of the guest's kernel: two bare ones, a raw disk and an overlay of ours."""
    published = publish_image(tmp_path / "published", BASE_BYTES)
    with KernelGuest(tmp_path, PORT) as guest:
        there = f"127.0.0.1:{guest.port(PORT)}"
        guest.call(inside.start_appliance, "lio", published.endpoint, published.fingerprint)
        made = {}
        for number, (subject, thin) in enumerate(
            {"bare LIO": False, "bare LIO thin": True}.items()
        ):
            iqn = guest.call(lio_guest.export_bare, number, DISK_BYTES, thin=thin)
            made[subject] = f"iscsi://{there}/{iqn}/1"
        for form, base in (("raw", ""), ("overlay", f"--reference {published.identifier}")):
            disk = _command(guest, f"disk create {base} --size {DISK_BYTES}")
            attachment = _command(guest, f"disk attach {disk['uuid']} --instance {form}")
            made[f"LIO {form}"] = attachment["iscsi_url"].replace(f"0.0.0.0:{PORT}", there)
        yield made
        guest.call(inside.stop_appliance, "lio")


def test_no_group_is_worse_through_us(urls: dict[str, str]) -> None:
    """What bare LIO passes with the same features, LIO as we use it passes too."""
    assert compare(groups(), urls, YARDSTICKS, LIMIT_S) == []


def _command(guest: KernelGuest, line: str) -> Any:
    status, document = guest.call(inside.command, "lio", line)
    assert status == 0, document
    return document
