"""`kill -9` of the API alone or of every process, at random moments of real work.

`make test` runs 5 rounds; `make crash` runs what CRASH_ROUNDS says. The seed is printed; give it
back as CRASH_SEED to choose the same moments again.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.appliance import Appliance
from support.publishing import Published, publish_image, slow_origin

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "5"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
IMAGE_BYTES = 24 * 1024**2
SETTLE_TIMEOUT_S = 90

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(60 + 40 * ROUNDS)]


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    """An image whose origin is slow enough to be killed in the middle of a fetch."""
    folder = tmp_path / "published"
    with slow_origin(folder, bytes_per_s=IMAGE_BYTES) as url:
        yield publish_image(folder, IMAGE_BYTES, compression="gz", locations=[f"{url}/image-1.gz"])


def test_what_was_begun_is_finished_or_undone(tmp_path: Path, published: Published) -> None:
    """After kill -9 of the API or of everything no target, mount, loop device, file or row is left
    over, and what is there is whole."""
    print(f"CRASH_SEED={SEED} CRASH_ROUNDS={ROUNDS}")
    chance = random.Random(SEED)
    appliance = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    )
    kills = {"api": 0, "everything": 0}
    with appliance:
        for number in range(ROUNDS):
            victim = chance.choice(("api", "everything"))
            kills[victim] += 1
            work = chance.choice((_work, _work_on_disks, _work_on_disks, _work_on_the_cache))
            workload = threading.Thread(target=work, args=(appliance, published, f"vm{number}"))
            workload.start()
            time.sleep(chance.uniform(0, 3))
            if victim == "api":
                for pid in appliance.pids("stratocache.api.server"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            else:
                appliance.kill()
                appliance.start()
            workload.join()
            _settle(appliance)
            _check(appliance, published)
            _clear(appliance)
            _check(appliance, published)
        print(f"kills: {kills}")
    assert _loop_devices(tmp_path) == []
    assert str(appliance.run_dir) not in Path("/proc/self/mounts").read_text()
    assert _processes_naming(str(tmp_path)) == []


def _work(appliance: Appliance, published: Published, instance: str) -> None:
    """What a launcher does, until somebody kills the other side."""
    with contextlib.suppress(OSError, KeyError, TypeError):
        appliance.request("POST", "/v1/images", {"reference": published.identifier})
        _, disk = appliance.request("POST", "/v1/disks", {"size_bytes": 2**20, "tag": instance})
        body = {
            "reference": published.identifier,
            "instance": instance,
            "disks": [disk["uuid"]],
            "readonly": [published.identifier],
        }
        appliance.request("POST", "/v1/launches", body)
        other = {"reference": published.identifier, "tag": "clone"}
        _, clone = appliance.request("POST", "/v1/disks", other)
        appliance.request(
            "POST", f"/v1/disks/{clone['uuid']}/attachments", {"instance": instance + "b"}
        )
        appliance.request("DELETE", f"/v1/launches/{instance}")


def _work_on_disks(appliance: Appliance, published: Published, instance: str) -> None:
    """What the owner of disks does, until somebody kills the other side."""
    with contextlib.suppress(OSError, KeyError, TypeError):
        body = {"reference": published.identifier, "instance": instance}
        _, launch = appliance.request("POST", "/v1/launches", body)
        boot = f"/v1/disks/{launch['boot']['disk_uuid']}"
        _, blank = appliance.request("POST", "/v1/disks", {"size_bytes": 4 * 2**20})
        raw = f"/v1/disks/{blank['uuid']}"
        kept = []
        for path in (boot, raw, boot):
            _, snapshot = appliance.request("POST", f"{path}/snapshots", {"tag": instance})
            kept.append(f"{path}/snapshots/{snapshot['id']}")
        appliance.request("POST", f"{boot}/save", {"title": instance})
        appliance.request("PATCH", boot, {"size_bytes": IMAGE_BYTES + 2**20})
        appliance.request("POST", f"{boot}/hydrate", {})
        appliance.request("POST", f"{kept[1]}/rollback", {})
        _, snapshots = appliance.request("GET", f"{boot}/snapshots")
        for snapshot in snapshots["snapshots"]:
            appliance.request("POST", "/v1/disks", {"snapshot": snapshot["id"]})
        appliance.request("DELETE", kept[0])
        outcome = "failed" if int(instance.removeprefix("vm")) % 2 else "done"
        appliance.request("DELETE", f"/v1/launches/{instance}?outcome={outcome}")


def _work_on_the_cache(appliance: Appliance, published: Published, instance: str) -> None:
    """What an operator does, beside a medium that rots, until somebody kills the other side."""
    with contextlib.suppress(OSError, KeyError, TypeError):
        image = f"/v1/images/{published.identifier}"
        appliance.request("POST", "/v1/images?wait=20", {"reference": published.identifier})
        chunks = [
            path for path in (appliance.state_dir / "chunks").rglob("*") if len(path.name) == 64
        ]
        for path in random.Random(instance).sample(chunks, min(3, len(chunks))):
            os.truncate(path, 1000)
        appliance.request("POST", "/v1/cache/scrub", {"action": "now"})
        appliance.request("POST", f"{image}/verify", {})
        appliance.request("POST", "/v1/cache/evict", {"bytes": 2**20})
        appliance.request("PUT", f"{image}/pin", {})
        body = {"reference": published.identifier, "instance": instance}
        appliance.request("POST", "/v1/launches?wait=20", body)
        appliance.request("POST", "/v1/cache/evict", {"image": published.identifier})
        appliance.request("DELETE", f"{image}/pin")
        appliance.request("POST", "/v1/cache/evict", {"bytes": 2**30})


def _rows(appliance: Appliance, query: str) -> list[sqlite3.Row]:
    database = sqlite3.connect(appliance.state_dir / "state.db", timeout=30)
    database.row_factory = sqlite3.Row
    with contextlib.closing(database):
        return database.execute(query).fetchall()


def _settle(appliance: Appliance) -> None:
    """Wait until the reconciler says that nothing is under way."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    unsettled = (
        "SELECT kind, subject, state FROM operations WHERE state IN ('pending', 'running') "
        "UNION ALL SELECT 'disk', uuid, state FROM disks WHERE state <> 'available' "
        "UNION ALL SELECT 'snapshot', id, state FROM snapshots WHERE state <> 'available' "
        "OR transient "
        "UNION ALL SELECT 'image', id, state FROM images WHERE state <> 'verified' "
        "UNION ALL SELECT 'attachment', id, state FROM attachments WHERE state <> 'ready' "
        "UNION ALL SELECT 'launch', instance, state FROM launches WHERE state <> 'active'"
    )
    while (rows := _rows(appliance, unsettled)) or not _serving(appliance):
        left = [tuple(row) for row in rows]
        assert time.monotonic() < deadline, f"{left}\n{appliance.log.read_text()[-6000:]}"
        time.sleep(0.05)


def _serving(appliance: Appliance) -> bool:
    """Whether all parts answer and a tgtd that was started again has its targets back."""
    if not appliance.ready():
        return False
    ready = len(_rows(appliance, "SELECT 1 FROM attachments WHERE state = 'ready'"))
    return len(_target_names(appliance)) == ready


def _check(appliance: Appliance, published: Published) -> None:
    """Compare rows, files, targets and mounts: each accounts for the other."""
    disks = {row["uuid"]: row["form"] for row in _rows(appliance, "SELECT * FROM disks")}
    images = {row["id"]: row["sha256"] for row in _rows(appliance, "SELECT * FROM images")}
    attachments = {row["id"] for row in _rows(appliance, "SELECT * FROM attachments")}
    named = _rows(
        appliance,
        "SELECT id FROM images UNION SELECT id FROM snapshots WHERE form = 'manifest' "
        "UNION SELECT base_manifest FROM disks WHERE base_manifest IS NOT NULL",
    )
    state, run = appliance.state_dir, appliance.run_dir

    assert set(os.listdir(state / "disks")) == set(disks)
    assert os.listdir(state / "stage") == []
    manifests = {name.removesuffix(".caibx") for name in os.listdir(state / "manifests")}
    assert manifests == {row[0] for row in named}
    for uuid, form in disks.items():
        _check_files(state / "disks" / uuid, form)
    overlays = {uuid for uuid, form in disks.items() if form == "overlay"}
    assert {name.partition(".")[0] for name in os.listdir(run / "live")} <= overlays
    assert set(os.listdir(run / "secrets")) == attachments
    assert set(os.listdir(run / "blocks" / "images")) == set(images)
    assert set(os.listdir(run / "blocks" / "disks")) == overlays
    assert _target_names(appliance) == {f"iqn.2026-11.org.stratocache:{id}" for id in attachments}
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    assert len([line for line in mounts if f" {run}/blocks " in line]) == 1
    assert images.get(published.identifier, published.sha256) == published.sha256
    for identifier, sha256 in images.items():
        content = (run / "blocks" / "images" / identifier).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256


def _check_files(directory: Path, form: str) -> None:
    """Every file of a disk is one that its layout names."""
    names = set(os.listdir(directory)) - {"snapshots"}
    if form == "raw":
        assert names == {"data"}
    else:
        layout = json.loads((directory / "layout.json").read_text())
        top = layout["top"]
        assert layout["frozen"] is None
        assert names == {"layout.json", f"{top}.data", f"{top}.bitmap"}


def _clear(appliance: Appliance) -> None:
    """Give everything back through the API."""
    _, launches = appliance.request("GET", "/v1/launches")
    for launch in launches["launches"]:
        assert appliance.request("DELETE", f"/v1/launches/{launch['instance']}")[0] == 204
    _, disks = appliance.request("GET", "/v1/disks")
    for disk in disks["disks"]:
        path = f"/v1/disks/{disk['uuid']}"
        _, held = appliance.request("GET", path + "/attachments")
        for attachment in held["attachments"]:
            status, _ = appliance.request("DELETE", f"{path}/attachments/{attachment['id']}")
            assert status == 204
        assert appliance.request("DELETE", f"{path}?snapshots=delete")[0] == 204
    for image in appliance.request("GET", "/v1/images")[1]["images"]:
        assert appliance.request("DELETE", f"/v1/images/{image['id']}/pin")[0] == 200
        assert appliance.request("DELETE", f"/v1/images/{image['id']}")[0] == 204
    chunks = [path for path in (appliance.state_dir / "chunks").rglob("*") if len(path.name) == 64]
    assert chunks == []
    assert os.listdir(appliance.state_dir / "seals") == []


def _target_names(appliance: Appliance) -> set[str]:
    """Ask the private tgtd itself, by discovery's other side: its own control socket."""
    done = subprocess.run(
        ["tgtadm", "--lld", "iscsi", "--op", "show", "--mode", "target"],
        env={**os.environ, "TGT_IPC_SOCKET": str(appliance.run_dir / "tgtd")},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("Target ")]
    return {line.split(": ", 1)[1] for line in lines}


def _loop_devices(folder: Path) -> list[str]:
    listed = subprocess.run(
        ["losetup", "-n", "-O", "BACK-FILE"], check=True, capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if line.startswith(str(folder))]


def _processes_naming(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if text in line:
                    found.append(line)
    return found
