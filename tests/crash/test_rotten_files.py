"""Files of the cache that rot while guests read through FUSE: no wrong byte reaches a reader.

`make test` hurts 40 files, `make crash` CRASH_FAULTS of them. The seed is printed; give it back as
CRASH_SEED to choose the same faults again.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from support.appliance import Appliance
from support.damage import DAMAGES, damage
from support.publishing import publish_image
from support.reading import Reader

FAULTS = int(os.environ.get("CRASH_FAULTS", "40"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
IMAGE_BYTES = 16 * 1024**2
RESTART_EVERY = 40
READERS = 2

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(180 + 4 * FAULTS)]


def test_no_wrong_byte_reaches_a_reader(tmp_path: Path) -> None:
    """Bits flip, files are cut, swapped, blanked and deleted below an image and a clone that are
    being read; every read is right, and in the end everything is whole again."""
    print(f"CRASH_SEED={SEED} CRASH_FAULTS={FAULTS}")
    chance = random.Random(SEED)
    published = publish_image(tmp_path / "published", IMAGE_BYTES)
    other = publish_image(tmp_path / "published", 4 * 1024**2, seed=2)
    content = published.image.read_bytes()
    faults: Counter[str] = Counter()
    appliance = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint,
        extra="[scrub]\nbytes_per_s = 16777216\n",
    )  # fmt: skip
    with appliance:
        for identifier in (published.identifier, other.identifier):
            appliance.json("image", "fetch", identifier)
        uuid = appliance.json("disk", "create", "--reference", published.identifier)["uuid"]
        blocks = appliance.run_dir / "blocks"
        paths = [blocks / "images" / published.identifier, blocks / "disks" / uuid]
        readers = [Reader(paths[number % 2], content, SEED + number) for number in range(READERS)]
        for reader in readers:
            reader.start()
        try:
            _hurt(appliance, chance, faults, readers)
        finally:
            for reader in readers:
                reader.finish()
        pieces = sum(reader.pieces for reader in readers)
        print(f"faults {dict(faults)}; pieces read {pieces}")
        for reader in readers:
            assert reader.wrong == []
            assert reader.failures == [], appliance.log.read_text()[-6000:]
            assert reader.pieces > 0
        for path in paths:
            assert path.read_bytes() == content
        verified = appliance.run("image", "verify", other.identifier)
        assert verified.returncode == 0, verified.stderr
        scrubbed = appliance.run("cache", "scrub", "--wait", timeout_s=300)
        assert scrubbed.returncode == 0, scrubbed.stdout
        assert appliance.json("cache", "status")["losses"] == []
        checked = appliance.run("cache", "check", "--deep", "--json")
        assert json.loads(checked.stdout)["faults"] == []
    assert sum(faults.values()) == FAULTS
    checked = appliance.run("cache", "check", "--repair", "--json")
    assert json.loads(checked.stdout)["leaks"] == []


def _hurt(
    appliance: Appliance, chance: random.Random, faults: Counter[str], readers: list[Reader]
) -> None:
    """Hurt files, and now and then kill `blockd`, which then trusts nothing that it has open."""
    while sum(faults.values()) < FAULTS:
        assert all(reader.is_alive() for reader in readers)
        kind = chance.choice(DAMAGES)
        if damage(appliance.state_dir, kind, chance):
            faults[kind] += 1
            if sum(faults.values()) % RESTART_EVERY == RESTART_EVERY // 2:
                for pid in appliance.pids("stratocache.fs.blockd"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        time.sleep(chance.uniform(0, 0.1))
