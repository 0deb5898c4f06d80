"""Somebody works with a real appliance by its web pages alone, beside a guest that runs."""

import hashlib
import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from stratodemo.guest import Guest
from support.appliance import Appliance, free_port
from support.browser import Tab, chromium, tab
from support.guests import file_disk, system_image
from support.plugging import pattern, plug_script, qmp, seen
from support.publishing import Published, publish_image, slow_origin

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(280)]

MIB = 1024**2
_IMAGE_BYTES = 24 * MIB
_BYTES_PER_S = 6 * MIB
_TIMEOUT_S = 120.0
_NAME, _PASSWORD = "jane", "correct horse battery"


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    """An image whose origin is slow enough to be watched."""
    folder = tmp_path / "origin"
    with slow_origin(folder, _BYTES_PER_S) as url:
        yield publish_image(folder, _IMAGE_BYTES, locations=[f"{url}/image-1"])


@pytest.fixture
def appliance(tmp_path: Path, published: Published) -> Iterator[Appliance]:
    """An appliance that serves its pages on the loopback interface, and an administrator."""
    network = f'[api]\naddress = "127.0.0.1"\nport = {free_port()}\ntls = false'
    with Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint,
        extra=network,
    ) as running:  # fmt: skip
        account = {"name": _NAME, "role": "admin", "password": _PASSWORD}
        assert running.request("POST", "/v1/accounts", account)[0] == 201
        yield running


def _address(appliance: Appliance) -> str:
    port = re.search(r"^port = (\d+)$", appliance.configuration.read_text(), re.MULTILINE)
    assert port is not None
    return f"http://127.0.0.1:{port[1]}"


def test_work_by_web_pages_alone(
    appliance: Appliance, published: Published, tmp_path: Path
) -> None:
    """Log in, preview and fetch an image and watch it come, create a disk of it, attach it to a
    running guest by the text that the page gives, take snapshots, detach, roll back, delete."""
    monitor = tmp_path / "qmp"
    machine = ["-device", "pcie-root-port,id=plug1,chassis=1",
               "-qmp", f"unix:{monitor},server=on,wait=off"]  # fmt: skip
    disks = file_disk(system_image(), boot=True, readonly=True)
    with ExitStack() as stack:
        guest = stack.enter_context(Guest([*disks, *machine], plug_script(2), name="vm-1"))
        browser = stack.enter_context(chromium())
        opened = stack.enter_context(tab(browser, _address(appliance)))
        _log_in(opened)
        _fetch_and_watch(opened, published)
        uuid = _create_disk(opened)
        _take_snapshot(opened.page, "as it came")
        plugged = _attach(opened, guest, monitor)
        original = published.image.read_bytes()[:MIB]
        assert guest.wait_for("read-1", _TIMEOUT_S) == hashlib.sha256(original).hexdigest()
        assert guest.wait_for("disk-1", _TIMEOUT_S)
        _take_snapshot(opened.page, "written")
        assert _first_mib(opened, uuid, "written") == pattern(1)
        _unplug(guest, monitor, plugged)
        _detach(opened.page)
        _roll_back(opened.page, "as it came")
        opened.shoot("worked-disk")
        assert _first_mib(opened, uuid) == original
        _grow(opened.page)
        _visit_others(opened)
        _delete(opened, uuid)
    assert appliance.request("GET", f"/v1/disks/{uuid}")[0] == 404
    _audited(appliance, uuid)


def _log_in(opened: Tab) -> None:
    opened.open("/images")
    page = opened.page
    page.get_by_label("Name").fill(_NAME)
    page.get_by_label("Password").fill(_PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/images")


def _fetch_and_watch(opened: Tab, published: Published) -> None:
    page = opened.page
    page.get_by_label("Reference").fill(published.identifier)
    page.get_by_role("button", name="Preview").click()
    preview = page.locator(".preview")
    expect(preview.get_by_role("heading", name="It would be fetched")).to_be_visible()
    expect(preview).to_contain_text(published.identifier)
    expect(preview).to_contain_text("the signature verifies")
    page.get_by_role("button", name="Fetch", exact=True).click()
    page.wait_for_url("**/operations/*")
    bar = page.locator("#operation progress[value]")
    expect(bar).to_be_visible()
    first = int(bar.get_attribute("value") or 0)
    page.wait_for_function(
        "first => { const bar = document.querySelector('#operation progress[value]');"
        " return !bar || Number(bar.getAttribute('value')) > first }",
        arg=first,
    )
    opened.shoot("worked-fetch")
    page.get_by_role("link", name="Go to the image").click()
    page.wait_for_url(f"**/images/{published.identifier}")
    expect(page.locator("#state")).to_contain_text("verified")
    expect(page.locator("#here svg").first).to_have_attribute(
        "aria-label", re.compile("^100 % of the image is here")
    )


def _create_disk(opened: Tab) -> str:
    page = opened.page
    page.get_by_role("link", name="Create a disk of it").click()
    page.get_by_label("Tag", exact=True).nth(0).fill("results")
    page.get_by_role("button", name="Create").click()
    page.wait_for_url("**/disks/*-*")
    expect(page.locator("h1")).to_have_text("results")
    return page.url.rpartition("/")[2]


def _take_snapshot(page: Page, name: str) -> None:
    form = page.locator("form[data-path$='/snapshots']")
    form.get_by_label("Tag").fill(name)
    form.get_by_role("button", name="Take a snapshot").click()
    row = page.locator("#snapshots tbody tr", has_text=name)
    expect(row).to_contain_text("available")
    expect(page.locator(f"#snapshots svg a[aria-label^='{name}']")).to_have_count(1)


def _attach(opened: Tab, guest: Guest, monitor: Path) -> str:
    """Attach, plug what the page says into the guest, and return the device's id."""
    page = opened.page
    page.get_by_label("Instance").fill("vm-1")
    page.get_by_role("button", name="Attach", exact=True).click()
    shown = page.locator("#attachments article")
    expect(shown).to_contain_text("ready")
    page.get_by_text("QEMU", exact=True).click()
    text = page.locator("pre[id^=qemu-text]").inner_text()
    arguments = shlex.split(text.replace("\\\n", ""))  # as a shell reads it
    opened.shoot("worked-attached")
    guest.wait_for("ready", _TIMEOUT_S)
    options = {
        name: _options(value) for name, value in zip(arguments[::2], arguments[1::2], strict=True)
    }
    secret, block, device = (options[name] for name in ("-object", "-blockdev", "-device"))
    qmp(monitor, "object-add", **{"qom-type": secret.pop(""), **secret})
    qmp(monitor, "blockdev-add", **{**block, "lun": int(block["lun"])})
    qmp(monitor, "device_add", driver=device.pop(""), id="plugged", bus="plug1", **device)
    return "plugged"


def _options(text: str) -> dict[str, Any]:
    """Read QEMU's `TYPE,name=value,…`; what has no name is the type."""
    parts = [part.partition("=") for part in text.split(",")]
    return {name if equals else "": value if equals else name for name, equals, value in parts}


def _unplug(guest: Guest, monitor: Path, device: str) -> None:
    qmp(monitor, "device_del", id=device)
    guest.wait_for("gone-1", _TIMEOUT_S)
    deadline = time.monotonic() + _TIMEOUT_S
    (node,) = (name for name in seen(monitor) if name.startswith("sc-") and "secret" not in name)
    while node in seen(monitor):  # in use until QEMU has let go of the device too
        assert time.monotonic() < deadline
        with suppress(AssertionError):
            qmp(monitor, "blockdev-del", **{"node-name": node})


def _detach(page: Page) -> None:
    page.get_by_role("button", name="Detach from vm-1").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("vm-1 loses the disk at once")
    expect(dialog.get_by_role("button", name="Keep it")).to_be_focused()
    dialog.get_by_role("button", name="Detach").click()
    expect(page.locator("#attachments")).to_contain_text("Nobody has it")


def _roll_back(page: Page, name: str) -> None:
    button = page.get_by_role("button", name=f"Roll back to {name}")
    expect(button).to_be_enabled()
    button.click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    button.click()
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    expect(page.locator("#status")).to_contain_text("again what it was")


def _first_mib(opened: Tab, uuid: str, snapshot: str = "") -> bytes:
    """Download by a link of the page, as the browser would; return the beginning."""
    page = opened.page
    link = page.get_by_role("link", name=f"Download {snapshot or 'raw'}", exact=True)
    path = link.get_attribute("href")
    answer = page.request.get(
        opened.address + (path or ""), headers={"Range": f"bytes=0-{MIB - 1}"}
    )
    assert answer.status == 206, answer.text()
    return answer.body()


def _grow(page: Page) -> None:
    form = page.locator("form", has_text="New size")
    form.get_by_label("New size").fill("32MiB")
    form.get_by_role("button", name="Grow").click()
    expect(page.locator("#facts")).to_contain_text("32 MiB")


def _visit_others(opened: Tab) -> None:
    """Look at the pages that the work has left something on."""
    for path, words in (
        ("/", "Latest events"), ("/attachments", "Nothing is attached"), ("/operations", "rollback"),
        ("/events", "snapshot"), ("/cache", "Scrubber"), ("/accounts", _NAME),
        ("/audit", "snapshot.rollback"),
    ):  # fmt: skip
        opened.open(path)
        expect(opened.page.locator("main")).to_contain_text(words)
        opened.shoot(f"worked-{path.strip('/') or 'overview'}")


def _delete(opened: Tab, uuid: str) -> None:
    opened.open(f"/disks/{uuid}")
    page = opened.page
    page.get_by_role("button", name="Delete the disk").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("2 snapshots: as it came, written")
    dialog.get_by_role("button", name="Delete the disk").click()
    page.wait_for_url("**/disks")
    expect(page.locator("#status")).to_have_text("The disk is deleted.")
    expect(page.locator("#disks")).to_contain_text("No disk yet")


def _audited(appliance: Appliance, uuid: str) -> None:
    """Everything that was clicked is in the audit log, as done by who clicked."""
    lines = appliance.request("GET", f"/v1/audit?user={_NAME}&limit=1000")[1]["audit"]
    actions = {line["action"] for line in lines}
    assert {
        "session.start", "reference.resolve", "image.fetch", "disk.create", "snapshot.create",
        "disk.attach", "disk.detach", "snapshot.rollback", "disk.delete",
    } <= actions, json.dumps(sorted(actions))  # fmt: skip
