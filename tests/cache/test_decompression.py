"""Decompression: what real tools make is read, truncation and damage are told apart, bombs held."""

import bz2
import gzip
import hashlib
import io
import lzma
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from stratocache.cache.decompression import decompressed
from stratocache.cache.entry import Compression
from stratocache.cache.errors import NotVerified

COMPRESSORS: dict[Compression, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
TOOLS: dict[Compression, list[str]] = {
    "gz": ["gzip"], "bz2": ["bzip2"], "xz": ["xz", "-T2"], "zst": ["zstd", "-q"],
}  # fmt: skip
ALL: list[Compression] = ["gz", "bz2", "xz", "zst"]
DATA = hashlib.shake_128(b"data").digest(300_000) + bytes(1_000_000) + b"end"


def _read_all(source: bytes, compression: Compression, piece: int = 65536) -> bytes:
    stream = decompressed(io.BytesIO(source), compression)
    pieces = []
    while data := stream.read(piece):
        assert len(data) <= piece
        pieces.append(data)
    assert stream.read(piece) == b""
    return b"".join(pieces)


@pytest.mark.parametrize("compression", ALL)
def test_what_the_real_tool_makes_is_read(tmp_path: Path, compression: Compression) -> None:
    """The output of gzip, bzip2, xz and zstd decompresses to what went in."""
    result = subprocess.run(
        [*TOOLS[compression], "-c"], input=DATA, capture_output=True, check=True
    )

    assert _read_all(result.stdout, compression) == DATA


def test_no_compression_passes_bytes_through() -> None:
    """The stream of an uncompressed source is the source."""
    assert _read_all(DATA, "none") == DATA


@pytest.mark.parametrize("compression", ALL)
@pytest.mark.parametrize("piece", [1000, 524288])
def test_several_members_are_one_stream(compression: Compression, piece: int) -> None:
    """Concatenated files decompress to concatenated content, as their tools do it."""
    compress = COMPRESSORS[compression]

    source = compress(DATA) + compress(b"") + compress(DATA[::-1])

    assert _read_all(source, compression, piece) == DATA + DATA[::-1]


@pytest.mark.parametrize("compression", ALL)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_truncated_stream_is_called_truncated(compression: Compression, kept: float) -> None:
    """A stream cut anywhere, in its checksum too, is truncated rather than short."""
    source = COMPRESSORS[compression](DATA)
    cut = min(int(len(source) * kept), len(source) - 1)

    with pytest.raises(NotVerified) as caught:
        _read_all(source[:cut], compression)

    assert caught.value.code == "source-truncated"


@pytest.mark.parametrize("compression", ALL)
def test_the_last_byte_counts(compression: Compression) -> None:
    """Even when all content has been read a missing last byte is noticed."""
    with pytest.raises(NotVerified) as caught:
        _read_all(COMPRESSORS[compression](DATA)[:-1], compression)

    assert caught.value.code == "source-truncated"


@pytest.mark.parametrize("compression", ALL)
def test_damage_is_called_corrupt(compression: Compression) -> None:
    """A changed byte in the middle is found by the stream's own checksum."""
    source = bytearray(COMPRESSORS[compression](DATA))
    source[len(source) // 2] ^= 0x55

    with pytest.raises(NotVerified) as caught:
        _read_all(bytes(source), compression)

    assert caught.value.code == "source-corrupt"


@pytest.mark.parametrize("compression", ALL)
def test_another_format_is_called_corrupt(compression: Compression) -> None:
    """Bytes that are no such stream at all are refused."""
    with pytest.raises(NotVerified) as caught:
        _read_all(b"<html>not found</html>" * 50, compression)

    assert caught.value.code == "source-corrupt"


@pytest.mark.parametrize("compression", ALL)
def test_a_bomb_gives_no_more_than_is_asked_for(compression: Compression) -> None:
    """One read of a stream of 128 MiB of zeros takes 40 MiB of memory at most."""
    bomb = COMPRESSORS[compression](bytes(128 * 1024**2))
    assert len(bomb) < 200_000
    stream = decompressed(io.BytesIO(bomb), compression)

    tracemalloc.start()
    data = stream.read(65536)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert data.strip(b"\0") == b""
    assert 0 < len(data) <= 65536
    assert peak < 40 * 1024**2


def test_xz_padding_between_streams_is_skipped() -> None:
    """Stream padding, zeros in fours, is part of the format."""
    source = lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4)

    assert _read_all(source, "xz") == b"onetwo"


def test_skippable_zstd_frames_are_skipped() -> None:
    """Frames that carry no content, as seekable files have, do not disturb."""
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"

    source = COMPRESSORS["zst"](b"one") + skippable + COMPRESSORS["zst"](b"two")

    assert _read_all(source, "zst") == b"onetwo"


def test_a_zstd_window_over_the_limit_is_refused() -> None:
    """A frame that wants more memory than zstd's own default is corrupt to us."""
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    source = compressor.compress(b"x" * 100_000) + compressor.flush()

    with pytest.raises(NotVerified) as caught:
        _read_all(source, "zst")

    assert caught.value.code == "source-corrupt"
