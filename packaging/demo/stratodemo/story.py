"""The story: a Marketplace reference becomes a running VM whose disk outlives it."""

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stratodemo import data_image
from stratodemo.endorser import EMAIL, Endorser, create_endorser
from stratodemo.guest import Guest
from stratodemo.narration import Narrator, require
from stratodemo.site import CommandFailed, Site
from stratodemo.system_image import build_system_image, compress

PREPARATION = ("system image", "data image")
"""The steps whose results are kept between runs."""

_GUEST_TIMEOUT_S = 150.0
_EXIT_CONFLICT = 4
_SHARED_FILE = "raw/record-2.bin"

_WRITE_DISK = """
part=$(make_partition "$(disk 1)") && mkfs.ext4 -q -L demo "$part" && mount "$part" /mnt || exit 1
head -c 8388608 /dev/urandom > /mnt/measurements
sync
report sha256 "$(sha256sum < /mnt/measurements | cut -d' ' -f1)"
umount /mnt
"""
_READ_DISK = """
mount -o ro "$(disk 1)1" /mnt || exit 1
report sha256 "$(sha256sum < /mnt/measurements | cut -d' ' -f1)"
umount /mnt
"""
_READ_SHARED = f"""
data=$(disk 1)
mount -o ro "${{data}}1" /mnt || exit 1
report sha256 "$(sha256sum < /mnt/{_SHARED_FILE} | cut -d' ' -f1)"
report mounted yes
read -r both_are_mounted
umount /mnt
if dd if=/dev/zero of="$data" bs=4096 count=1 oflag=direct 2> /dev/null; then
    report write accepted
else
    report write refused
fi
"""


@dataclass
class Publication:
    """An image that the endorser has published."""

    raw: Path
    published: Path
    identifier: str = ""


@dataclass
class Story:
    """The steps in order; each one checks what it shows."""

    narrator: Narrator
    site: Site
    images: Path
    """Where built images are kept between runs."""
    system: Publication = field(init=False)
    data: Publication = field(init=False)
    endorser: Endorser = field(init=False)
    disk: str = field(init=False)
    written: str = field(init=False)
    """SHA-256 of what the first VM wrote."""

    def tell(self) -> None:
        """Play all chapters. Raises `StepFailed`, `GuestError` or `ProgramError`."""
        self._build()
        self._publish()
        self._start()
        self._first_machine()
        self._second_machine()
        self._shared_data()
        self._look_inside()
        self._clean_up()

    def _build(self) -> None:
        self.narrator.chapter(
            "Two images to work with",
            "A bootable system (Debian's kernel, busybox) and a disk with some files, made from "
            "Debian packages on this machine. They are kept in build/demo for the next run.",
        )
        with self.narrator.step(PREPARATION[0]) as details:
            raw = build_system_image(self.images)
            packed = compress(raw)
            self.system = Publication(raw, packed)
            details += [f"{_mib(raw)} raw", f"{_mib(packed)} as gzip"]
        with self.narrator.step(PREPARATION[1]) as details:
            raw = data_image.build_data_image(self.images)
            self.data = Publication(raw, raw)
            details += [f"{_mib(raw)} raw", f"{len(data_image.file_tree())} files"]

    def _publish(self) -> None:
        self.narrator.chapter(
            "An endorser publishes them in a Marketplace",
            "A Marketplace holds no images, only signed entries: what an image is, its size and "
            "digests, where its bytes are, and who vouches for it.",
        )
        with self.narrator.step("key and certificate of the endorser") as details:
            self.endorser = create_endorser(self.site.folder)
            details.append(EMAIL)
        for title, kind, image in (
            ("demo-system", "machine", self.system),
            ("demo-data", "disk", self.data),
        ):
            with self.narrator.step(f"{title} described and signed") as details:
                self._endorse(title, kind, image)
                details.append(image.identifier)
        with self.narrator.step("Marketplace serves the entries") as details:
            self.site.start_marketplace()
            details.append(self.site.marketplace_url)

    def _endorse(self, title: str, kind: str, image: Publication) -> None:
        shutil.copy2(image.published, self.site.published)
        entry = self.site.folder / f"{title}.xml"
        location = f"{self.site.marketplace_url}/images/{image.published.name}"
        self.site.command(
            "marketplace", "build-metadata", image.published, "--output", entry,
            "--location", location, "--title", title, "--kind", kind,
            "--os", "Debian", "--os-version", "12", "--os-arch", "x86_64",
        )  # fmt: skip
        signed = self.site.entries / entry.name
        answer = self.site.query(
            "marketplace", "sign", entry, "--output", signed,
            "--key", self.endorser.key, "--certificate", self.endorser.certificate,
        )  # fmt: skip
        self.site.command("marketplace", "validate", signed)
        image.identifier = str(answer["identifier"])

    def _start(self) -> None:
        self.narrator.chapter(
            "This host gets a Stratocache appliance",
            "It is told one Marketplace and one certificate to trust; nothing else is believed.",
        )
        with self.narrator.step("appliance is ready"):
            self.site.configure(self.endorser.fingerprint_sha256)
            self.site.start_appliance()
        with self.narrator.step("it finds the entry and accepts its signature") as details:
            entry = self.site.query("marketplace", "show", self.system.identifier)
            require(entry["trust"] == "signed", f"its trust is {entry['trust']}")
            details.append(f"endorsed by {entry['endorser']['email']}")

    def _first_machine(self) -> None:
        self.narrator.chapter(
            "A disk, and a first VM that writes to it",
            "The launch names the image; the appliance finds its entry, checks signature and "
            "policy, fetches and verifies the image, clones it for this VM, and exports the clone "
            "and the disk over iSCSI. QEMU boots from that.",
        )
        with self.narrator.step("disk created") as details:
            made = self.site.query("disk", "create", "--size", "1G", "--tag", "demo")
            self.disk = str(made["uuid"])
            require(made["size_bytes"] == 1024**3, f"its size is {made['size_bytes']}")
            details += ["1 GiB", self.disk]
        with self.narrator.step("vm1 launched, image fetched and verified"):
            launch = self._launch("vm1", "--disk", self.disk)
        reports = self._run_guest("vm1", launch, _WRITE_DISK, "partitions, formats and writes it")
        self.written = reports["sha256"]
        self._halt("vm1")

    def _second_machine(self) -> None:
        self.narrator.chapter(
            "A second VM finds what the first one wrote",
            "The image is in the cache now, so the launch copies and downloads nothing. A disk "
            "that can be written belongs to one VM at a time.",
        )
        with self.narrator.step("vm2 launched from the cache"):
            launch = self._launch("vm2", "--disk", self.disk)
        with self.narrator.step("a third taker is refused while vm2 has the disk") as details:
            words = self._refusal("disk", "attach", self.disk, "--instance", "intruder")
            details.append(words.removeprefix("error: "))
        found = self._run_guest("vm2", launch, _READ_DISK, "mounts and reads it")
        with self.narrator.step("same bytes") as details:
            require(found["sha256"] == self.written, "vm2 read other bytes than vm1 wrote")
            details.append(f"sha256 {self.written[:16]}…")
        self._halt("vm2")
        cold = self.narrator.durations_s["vm1 launched, image fetched and verified"]
        warm = self.narrator.durations_s["vm2 launched from the cache"]
        self.narrator.note(
            f"The cached launch took {warm:.2f} s instead of {cold:.2f} s: "
            f"{cold / warm:.0f} times faster."
        )

    def _shared_data(self) -> None:
        self.narrator.chapter(
            "Two VMs share one read-only image",
            "Data sets are published like systems. Any number of VMs mount the one cached copy; "
            "none can change it.",
        )
        launches = {}
        for instance in ("vm3", "vm4"):
            with self.narrator.step(f"{instance} launched with the data image"):
                launches[instance] = self._launch(instance, "--readonly-disk", self.data.identifier)
        expected = data_image.digests(data_image.file_tree())[_SHARED_FILE]
        guests = [
            Guest(launch["qemu_args"], _READ_SHARED, name=name) for name, launch in launches.items()
        ]
        with guests[0] as one, guests[1] as two:
            with self.narrator.step("vm3 and vm4 have it mounted at the same time"):
                for guest in (one, two):
                    guest.wait_for("mounted", _GUEST_TIMEOUT_S)
            for guest in (one, two):
                guest.send("go on")
            with self.narrator.step("both read the right bytes, both are refused a write"):
                for guest in (one, two):
                    reports = guest.finish(_GUEST_TIMEOUT_S)
                    require(reports["sha256"] == expected, f"{guest.name} read wrong bytes")
                    require(reports["write"] == "refused", f"{guest.name} could write")
        with self.narrator.step("the target itself refuses a write, not only the VM") as details:
            details.append(self._write_refusal(launches["vm3"]))
        for instance in launches:
            self._halt(instance)

    def _look_inside(self) -> None:
        self.narrator.chapter(
            "The cached image on this host",
            "Looking into an image needs no VM: its partition is mounted read-only from the cache.",
        )
        folder = self.site.folder / "mounted"
        folder.mkdir()
        with self.narrator.step("data image mounted") as details:
            self.site.command("image", "mount", self.data.identifier, folder)
            names = sorted(path.name for path in folder.iterdir() if path.name != "lost+found")
            details.append("  ".join(names))
        with self.narrator.step("a file compared with the original"):
            original = data_image.file_tree()["station.csv"]
            require((folder / "station.csv").read_bytes() == original, "station.csv differs")
        with self.narrator.step("unmounted"):
            self.site.command("image", "umount", folder)
            require(not folder.is_mount(), f"{folder} is still a mount")

    def _clean_up(self) -> None:
        self.narrator.chapter("Cleaning up")
        with self.narrator.step("disk and images deleted"):
            self.site.command("disk", "rm", self.disk)
            for image in (self.system, self.data):
                self.site.command("image", "rm", image.identifier)
        with self.narrator.step("appliance and servers stopped, nothing left behind"):
            self.site.stop_all()
            left = self.site.leftovers()
            require(left == [], f"still there: {', '.join(left)}")

    def _launch(self, instance: str, *options: str) -> dict[str, Any]:
        answer = self.site.query("launch", self.system.identifier, "--instance", instance, *options)
        require(bool(answer.get("qemu_args")), f"{instance}: no QEMU arguments in the answer")
        return dict(answer)

    def _halt(self, instance: str) -> None:
        with self.narrator.step(f"{instance} halted, its boot disk deleted"):
            self.site.command("halt", instance)

    def _run_guest(
        self, instance: str, launch: dict[str, Any], script: str, what: str
    ) -> dict[str, str]:
        with Guest(launch["qemu_args"], script, name=instance) as guest:
            with self.narrator.step(f"{instance} boots from its clone"):
                guest.wait_for("up", _GUEST_TIMEOUT_S)
            with self.narrator.step(f"{instance} {what}, and powers off"):
                return guest.finish(_GUEST_TIMEOUT_S)

    def _refusal(self, *arguments: str) -> str:
        try:
            self.site.command(*arguments)
        except CommandFailed as error:
            require(error.status == _EXIT_CONFLICT, str(error))
            return error.words
        require(False, "it was not refused")
        raise AssertionError

    def _write_refusal(self, launch: dict[str, Any]) -> str:
        """Write through QEMU's initiator as if the disk were writable; return the complaint."""
        url = next(
            attachment["iscsi_url"]
            for attachment in launch["attachments"]
            if attachment["role"] == "readonly"
        )
        result = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 4k", url],
            check=False, capture_output=True, text=True, timeout=_GUEST_TIMEOUT_S,
        )  # fmt: skip
        words = (result.stderr + result.stdout).strip()
        require("write protected" in words, f"qemu-io said {words!r}")
        return "write protected"


def _mib(path: Path) -> str:
    return f"{path.stat().st_size / 1024**2:.0f} MiB"
