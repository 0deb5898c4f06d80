"""Seals: what tells a manifest that is still as it was written from one that is not.

A manifest names chunks by digest, but nothing in the file says that its own list is right: a digest
that was exchanged for another chunk's would be served as verified. So each manifest has a seal in
`seals/ID`: the SHA-256 of its name and its bytes. A seal is written before its manifest and keeps
the one before as a second line, so that a crash between the two leaves a manifest that is sealed.
The manifest has its seal as an extended attribute too, where the file system keeps those: so that
neither the loss of a seal loses a manifest, nor an exchange of manifests without seals is believed.
"""

import errno
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from stratocache.cache.errors import NotVerified
from stratocache.cache.manifest import Manifest, fsync_directory

IMAGE_BYTES_MAX = 64 * 1024**4
"""No manifest of ours describes more; it bounds the memory that a damaged file can claim."""
SUFFIX = ".caibx"

_DOMAIN = b"stratocache manifest\0"
_SEAL_CHARACTERS = 64
_SEAL = re.compile(f"[0-9a-f]{{{_SEAL_CHARACTERS}}}")
_ATTRIBUTE = "user.stratocache.seal"  # xattr(7)
_NO_ATTRIBUTE = frozenset({errno.ENODATA, errno.ENOTSUP})
_SEALS_BYTES_MAX = 2 * (_SEAL_CHARACTERS + 1)


def manifest_path(state_dir: Path, identifier: str) -> Path:
    """Return where a manifest is, or would be."""
    return state_dir / "manifests" / f"{identifier}{SUFFIX}"


def seal_path(state_dir: Path, identifier: str) -> Path:
    """Return where a manifest's seal is, or would be."""
    return state_dir / "seals" / identifier


def read_manifest(
    state_dir: Path, identifier: str, *, image_bytes_max: int = IMAGE_BYTES_MAX
) -> Manifest:
    """Read a manifest and compare it with its seal; one of an older version has none at all.

    Raises `NotVerified` (`manifest-invalid`) and `FileNotFoundError`.
    """
    path = manifest_path(state_dir, identifier)
    manifest, content = Manifest.load(path, image_bytes_max=image_bytes_max)
    seals = _read(seal_path(state_dir, identifier))
    attribute = _attribute(path)
    if attribute is not None:
        seals = [attribute, *(seals or ())]
    if seals is not None and _seal(identifier, content) not in seals:
        raise NotVerified(
            "manifest-invalid", f"{path} is not a valid manifest: it is not what its seal says."
        )
    return manifest


def write_manifest(state_dir: Path, identifier: str, manifest: Manifest) -> None:
    """Make a manifest and its seal durable, the seal first."""
    seal = _seal(identifier, manifest.to_bytes())
    _write(state_dir, identifier, seal)
    manifest.write(manifest_path(state_dir, identifier), mark=lambda path: _mark(path, seal))


def adopt(state_dir: Path, identifier: str) -> None:
    """Seal a manifest of an older version as it is, and put back a seal that is damaged or gone.

    Raises as `read_manifest` does.
    """
    read_manifest(state_dir, identifier)
    path = manifest_path(state_dir, identifier)
    seal = _seal(identifier, path.read_bytes())
    if seal not in (_read(seal_path(state_dir, identifier)) or ()):
        _write(state_dir, identifier, seal)
        if not path.exists():  # it went meanwhile
            remove(state_dir, identifier)
    if _attribute(path) != seal:
        with suppress(FileNotFoundError):
            _mark(path, seal)


def remove(state_dir: Path, identifier: str) -> None:
    """Remove a seal, after its manifest; absent is fine."""
    seal_path(state_dir, identifier).unlink(missing_ok=True)


def _seal(identifier: str, content: bytes) -> str:
    return hashlib.sha256(_DOMAIN + identifier.encode() + b"\0" + content).hexdigest()


def _read(path: Path) -> list[str] | None:
    """Return the seals of a file, none of them right when it is damaged; None without a file."""
    try:
        with path.open("rb") as file:
            return file.read(_SEALS_BYTES_MAX + 1).decode("ascii", "replace").split("\n")
    except FileNotFoundError:
        return None


def _write(state_dir: Path, identifier: str, seal: str) -> None:
    path = seal_path(state_dir, identifier)
    path.parent.mkdir(mode=0o750, exist_ok=True)
    before = [old for old in _read(path) or () if _SEAL.fullmatch(old) and old != seal]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.write("\n".join([seal, *before[:1]]))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def _attribute(path: Path) -> str | None:
    """Return the seal that a manifest's file has itself; None when there is none."""
    try:
        return os.getxattr(path, _ATTRIBUTE).decode("ascii", "replace")
    except OSError as error:
        if error.errno in _NO_ATTRIBUTE or isinstance(error, FileNotFoundError):
            return None
        raise


def _mark(path: Path, seal: str) -> None:
    """Give a file its seal, where the file system keeps attributes."""
    try:
        os.setxattr(path, _ATTRIBUTE, seal.encode())
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
