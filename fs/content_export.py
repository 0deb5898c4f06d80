"""A disk's bytes as qcow2: converted by `qemu-img`, with limits, into a file without a name.

Source: qemu-img(1), prlimit(1), setpriv(1).
"""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Internal
from stratocache.cache.space import Space, full_disk_is_no_space, no_space
from stratocache.fs.content_source import FileSource, Source
from stratocache.fs.sparse_file import write_sparse
from stratocache.fs.transfers import DOWNLOAD, claimed_directory

_MEMORY_BYTES = 2 * 1024**3
_CPU_S = 4 * 3600
_TIMEOUT_S = 8 * 3600
_POLL_S = 0.1
_STDERR_BYTES = 400
_METADATA_BYTES = 64 * 1024**2


def export_qcow2(configuration: Configuration, source: Source) -> FileSource:
    """Return a source's bytes as a qcow2 file that is gone once it is closed.

    Only what is not zero is stored. Raises `NoSpace` (`no-space`) as soon as the reserve is
    touched, and `Internal` (`export-failed`). Nothing is left but what is returned.
    """
    space = Space(configuration.state_dir, configuration.space.reserve_bytes)
    space.require(0)
    with claimed_directory(configuration, DOWNLOAD) as directory:
        container = directory / "image.qcow2"
        raw = source.path if isinstance(source, FileSource) else _copy(source, directory, space)
        size_bytes = source.size_bytes
        limits = [
            f"--as={_MEMORY_BYTES}", f"--cpu={_CPU_S}", "--core=0",
            # clusters and their tables; 8 bytes of table for 64 KiB, twice for the reference counts
            f"--fsize={size_bytes + size_bytes // 1024 + _METADATA_BYTES}",
        ]  # fmt: skip
        command = [
            # it must not outlive a process that is killed
            "setpriv", "--pdeathsig", "KILL", "prlimit", *limits, "--", "qemu-img", "convert", "-f", "raw", "-O", "qcow2",
            "-S", "4k", str(raw), str(container),
        ]  # fmt: skip
        with tempfile.TemporaryFile() as output, _running(command, output.fileno()) as process:
            _wait(process, space)
            output.seek(0)
            text = output.read(_STDERR_BYTES).decode("utf-8", "replace").strip()
        if process.returncode != 0:
            if "No space left" in text:
                raise no_space(directory, "converting the disk")
            raise Internal("export-failed", f"qemu-img cannot convert the disk: {text}.")
        return FileSource(container, container.stat().st_size)


def _copy(source: Source, directory: Path, space: Space) -> Path:
    """Write a source's bytes as a sparse raw file."""
    raw = directory / "image.raw"
    with full_disk_is_no_space(directory), raw.open("wb") as file:
        position = 0
        for piece in source.pieces(0, source.size_bytes):
            space.require(len(piece))
            write_sparse(file.fileno(), piece, position)
            position += len(piece)
        file.truncate(position)
    return raw


@contextmanager
def _running(command: list[str], output: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait(process: subprocess.Popen[bytes], space: Space) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            process.wait(_POLL_S)
            return
        except subprocess.TimeoutExpired:
            space.require(0)
            if time.monotonic() > deadline:
                raise Internal("export-failed", "qemu-img did not end in time.") from None
