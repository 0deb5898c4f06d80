"""Where the bytes of a qcow2 image are in its file: header, tables, entries; never a byte of data.

Enough to read a published image by ranges. Only what `qemu-img convert` makes is read: no backing
file, no external data file, no encryption, no subclusters. Whatever a table says, the chunks that
come of it are compared with digests that an endorser signed. Source: QEMU, docs/interop/qcow2.txt.
"""

import struct
from dataclasses import dataclass

from stratocache.cache.errors import NotVerified

HEADER_BYTES = 112
"""As much of a header as is looked at."""
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">Q")
_INCOMPATIBLE_DIRTY, _COMPRESSION_TYPE, EXTENDED_L2 = 1, 8, 16
_FEATURES_ACCEPTED = _INCOMPATIBLE_DIRTY | _COMPRESSION_TYPE | EXTENDED_L2
_FEATURE_EXTERNAL_DATA = 4
_FEATURES_OFFSET, _HEADER_LENGTH_OFFSET, _COMPRESSION_OFFSET = 72, 100, 104
_CLUSTER_BITS = range(9, 22)
_L1_BYTES_MAX = 32 * 1024**2
_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_ZERO = 1
_SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Header:
    """A header that has been judged."""

    size_bytes: int
    """Of the virtual disk."""
    cluster_bits: int
    l1_offset: int
    l1_entries: int
    zstd: bool
    """Whether compressed clusters are zstd, not deflate."""
    extended_l2: bool

    @property
    def cluster_bytes(self) -> int:
        """The size of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """How many clusters one table of the second level names."""
        return self.cluster_bytes // 8


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a cluster is in the file."""

    offset: int
    size_bytes: int
    compressed: bool


def judge_header(header: bytes, *, image_bytes_max: int) -> Header:
    """Return what a header says, if it is of an image without obstacles.

    Raises `NotVerified`: `image-format`, `image-backing-file`, `image-too-large`.
    """
    if len(header) < _HEADER.size or header[:4] != b"QFI\xfb":
        raise format_error("it does not begin as qcow2 does")
    (_, version, backing_offset, backing_bytes, cluster_bits, size_bytes, crypt, l1_entries,
     l1_offset, *_) = _HEADER.unpack_from(header)  # fmt: skip
    if version not in (2, 3):
        raise format_error(f"qcow2 version {version} is unknown")
    features, compression = 0, 0
    if version == 3 and len(header) >= _COMPRESSION_OFFSET:
        features = _FEATURES.unpack_from(header, _FEATURES_OFFSET)[0]
        [header_bytes] = struct.unpack_from(">I", header, _HEADER_LENGTH_OFFSET)
        if header_bytes > _COMPRESSION_OFFSET and len(header) > _COMPRESSION_OFFSET:
            compression = header[_COMPRESSION_OFFSET]
    if backing_offset or backing_bytes or features & _FEATURE_EXTERNAL_DATA:
        raise backing_error()
    if crypt:
        raise format_error("it is encrypted")
    if features & ~_FEATURES_ACCEPTED:
        raise format_error(f"it needs features {features:#x}")
    if size_bytes > image_bytes_max:
        raise NotVerified(
            "image-too-large",
            f"The qcow2 image claims a disk of {size_bytes} bytes, over the limit of "
            f"{image_bytes_max}; raise fetch.max_image_bytes if that is intended.",
        )
    return Header(
        size_bytes, cluster_bits, l1_offset, l1_entries, compression == 1,
        bool(features & EXTENDED_L2),
    )  # fmt: skip


def require_readable(header: Header, image_bytes: int) -> None:
    """Refuse what is not read by ranges, though `qemu-img` may; raises `NotVerified`."""
    if header.size_bytes != image_bytes:
        raise format_error(f"its disk has {header.size_bytes} bytes, not {image_bytes}")
    if header.cluster_bits not in _CLUSTER_BITS or header.extended_l2:
        raise format_error("its clusters are of another kind than qemu-img makes")
    clusters = -(-image_bytes // header.cluster_bytes)
    if header.l1_entries * 8 > _L1_BYTES_MAX or header.l1_entries * header.l2_entries < clusters:
        raise format_error("its table does not belong to a disk of this size")


def table_offset(entry: int) -> int:
    """Return where a table of the second level is, 0 when there is none."""
    return entry & _OFFSET_MASK


def locate(entry: int, header: Header) -> Extent | None:
    """Return where the cluster of an entry of the second level is; None when it is all zeros."""
    if entry & _COMPRESSED:
        offset_bits = 62 - (header.cluster_bits - 8)
        offset = entry & ((1 << offset_bits) - 1)
        sectors = (entry & (_COMPRESSED - 1)) >> offset_bits
        packed_bytes = (sectors + 1) * _SECTOR_BYTES - offset % _SECTOR_BYTES
        return Extent(offset, packed_bytes, compressed=True)
    offset = entry & _OFFSET_MASK
    if entry & _ZERO or not offset:
        return None
    if offset % header.cluster_bytes:
        raise format_error("a cluster does not begin where clusters do")
    return Extent(offset, header.cluster_bytes, compressed=False)


def format_error(fault: str) -> NotVerified:
    """Return the error for a file that is no usable qcow2 image."""
    return NotVerified("image-format", f"The source is not a usable qcow2 image: {fault}.")


def backing_error() -> NotVerified:
    """Return the error for an image that needs another file."""
    return NotVerified(
        "image-backing-file",
        "The qcow2 image refers to another file; publish it flattened (qemu-img convert).",
    )
