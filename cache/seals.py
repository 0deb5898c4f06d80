"""Seals: what tells a manifest that is still as it was written from one that is not.

A manifest names chunks by digest, but nothing in the file says that its own list is right: a digest
that was exchanged for another chunk's would be served as verified. So each manifest has a seal in
`seals/ID`: the SHA-256 of its name and its bytes. A seal is written before its manifest and keeps
the one before as a second line, so that a crash between the two leaves a manifest that is sealed.
"""

import hashlib
import os
from pathlib import Path

from stratocache.cache.errors import NotVerified
from stratocache.cache.manifest import Manifest, fsync_directory

IMAGE_BYTES_MAX = 64 * 1024**4
"""No manifest of ours describes more; it bounds the memory that a damaged file can claim."""
SUFFIX = ".caibx"

_DOMAIN = b"stratocache manifest\0"
_SEAL_CHARACTERS = 64
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
    """Read a manifest and compare it with its seal; one of an older version has none.

    Raises `NotVerified` (`manifest-invalid`) and `FileNotFoundError`.
    """
    path = manifest_path(state_dir, identifier)
    manifest, content = Manifest.load(path, image_bytes_max=image_bytes_max)
    seals = _read(seal_path(state_dir, identifier))
    if seals is not None and _seal(identifier, content) not in seals:
        raise NotVerified(
            "manifest-invalid", f"{path} is not a valid manifest: it is not what its seal says."
        )
    return manifest


def write_manifest(state_dir: Path, identifier: str, manifest: Manifest) -> None:
    """Make a manifest and its seal durable, the seal first."""
    _write(state_dir, identifier, _seal(identifier, manifest.to_bytes()))
    manifest.write(manifest_path(state_dir, identifier))


def adopt(state_dir: Path, identifier: str) -> None:
    """Seal a manifest of an older version as it is; one that has a seal is left alone.

    Raises as `read_manifest` does.
    """
    if not seal_path(state_dir, identifier).exists():
        path = manifest_path(state_dir, identifier)
        _, content = Manifest.load(path, image_bytes_max=IMAGE_BYTES_MAX)
        _write(state_dir, identifier, _seal(identifier, content))


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
    before = [old for old in _read(path) or () if len(old) == _SEAL_CHARACTERS and old != seal]
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
