"""Seals whose files are damaged in every place."""

from pathlib import Path

from stratocache.cache import seals
from stratocache.cache.manifest import Manifest

FIRST = Manifest(4096, b"\1" * 32)
SECOND = Manifest(4096, b"\2" * 32)


def test_no_damage_of_a_seal_keeps_an_image_from_being_sealed_anew(tmp_path: Path) -> None:
    """Whichever bit of a seal flips and wherever it is cut, the manifest that is written next can be
    read; so can one that is there, whose seal is put back."""
    (tmp_path / "manifests").mkdir()
    seals.write_manifest(tmp_path, "one", FIRST)
    seals.write_manifest(tmp_path, "one", SECOND)
    path = seals.seal_path(tmp_path, "one")
    whole = path.read_bytes()
    assert len(whole.split(b"\n")) == 2
    flipped = [_flipped(whole, bit) for bit in range(8 * len(whole))]
    cut = [whole[:size] for size in range(len(whole))]
    for damaged in (*flipped, *cut, bytes(len(whole)), b"\xff" * 4096):
        path.write_bytes(damaged)
        seals.write_manifest(tmp_path, "one", FIRST)
        assert seals.read_manifest(tmp_path, "one") == FIRST
        path.write_bytes(damaged)
        seals.adopt(tmp_path, "one")
        assert seals.read_manifest(tmp_path, "one") == FIRST


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
