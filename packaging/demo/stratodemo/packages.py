"""Debian packages as raw material: downloaded once, verified by apt, unpacked without installing."""

import re
import tempfile
from pathlib import Path

from stratodemo.programs import ProgramError, run_program

_CLOUD_KERNEL = "linux-image-cloud-amd64"


def obtain(name: str, store: Path) -> Path:
    """Return the `.deb` of package `name`, from `store` when it is there, else through apt.

    apt verifies the download with the archive's signed index. A machine without an index gets one
    (`apt-get update`) and a second try. Raises `ProgramError`.
    """
    store.mkdir(parents=True, exist_ok=True)
    kept = _newest(name, store)
    return kept if kept is not None else _download(name, store)


def obtain_kernel(store: Path, meta_package: str = _CLOUD_KERNEL) -> Path:
    """Return the `.deb` with the kernel that `meta_package` names, by default Debian's for virtual
    machines. A store holds one kernel. Raises `ProgramError`."""
    store.mkdir(parents=True, exist_ok=True)
    kept = _newest("linux-image-[0-9]*", store)
    return kept if kept is not None else _download(_kernel_package(meta_package), store)


def unpack(package: Path, directory: Path) -> None:
    """Unpack the files of `package` into `directory`; none of its scripts runs."""
    directory.mkdir(parents=True, exist_ok=True)
    run_program(["dpkg-deb", "-x", package, directory])


def _newest(pattern: str, store: Path) -> Path | None:
    found = sorted(store.glob(f"{pattern}_*.deb"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _download(name: str, store: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=store) as folder_name:
        folder = Path(folder_name)
        try:
            run_program(["apt-get", "download", "-qq", name], directory=folder)
        except ProgramError:
            run_program(["apt-get", "update", "-qq"])
            run_program(["apt-get", "download", "-qq", name], directory=folder)
        downloaded = next(folder.glob("*.deb"))
        return downloaded.rename(store / downloaded.name)


def _kernel_package(meta_package: str) -> str:
    depends = ["apt-cache", "depends", "--important", meta_package]
    try:
        listing = run_program(depends)
    except ProgramError:
        run_program(["apt-get", "update", "-qq"])
        listing = run_program(depends)
    match = re.search(r"Depends: (linux-image-\d\S*)", listing)
    if match is None:
        raise ProgramError(f"apt knows no kernel behind {meta_package}.")
    return match[1]
