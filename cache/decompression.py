"""Streaming decompression with bounded memory: gz, bz2, xz, zst and none.

Output comes in pieces of the size asked for, whatever the ratio, so that a decompression bomb
costs its caller no more than one piece beyond the limit that the caller enforces.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol

import zstandard

from stratocache.cache.entry import Compression
from stratocache.cache.errors import NotVerified

_XZ_MEMORY_BYTES = 512 * 1024**2
_ZSTD_WINDOW_BYTES = 128 * 1024**2
"""What `zstd` itself accepts without `--long=28` or more."""
_ZSTD_INPUT_BYTES = 1024
"""Fed at once. A block of 4 bytes may stand for 128 KiB, so this bounds one feed to 32 MiB."""
_READ_BYTES = 256 * 1024


class ByteStream(Protocol):
    """Anything to read decompressed bytes from."""

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none only at the end."""
        ...


def decompressed(source: BinaryIO, compression: Compression) -> ByteStream:
    """Return a stream of what `source`, an open file, holds compressed.

    Reads of it raise `NotVerified`: `source-truncated` when the compressed stream ends too early,
    `source-corrupt` when it is no such stream or damaged.
    """
    opener = _STREAMS[compression]
    return source if opener is None else _Checked(opener(source), compression)


class _Checked:
    def __init__(self, stream: ByteStream, compression: Compression) -> None:
        self._stream = stream
        self._compression = compression

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except EOFError:
            raise NotVerified(
                "source-truncated",
                f"The {self._compression} stream ends before its end mark; the server's file or "
                "the download is incomplete. Try another location.",
            ) from None
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's fault, not the stream's
            raise NotVerified(
                "source-corrupt",
                f"The source is not a sound {self._compression} stream ({error}); check the "
                "entry's compression and the server's file.",
            ) from None


class _GzipStream:
    """A gzip file of any number of members; Python's reader takes an empty file for a whole one."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._file = gzip.GzipFile(fileobj=source, mode="rb")

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if not data and self._source.tell() == 0:
            raise EOFError
        return data


class _XzStream:
    """An xz file of any number of streams, with a limit on the decoder's memory."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._decoder = _xz_decoder()
        self._pending = b""

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof and not self._next_stream():
                return b""
            data = b""
            if self._decoder.needs_input:
                data, self._pending = self._pending or self._source.read(_READ_BYTES), b""
                if not data:
                    raise EOFError
            output = self._decoder.decompress(data, size)
            if output:
                return output

    def _next_stream(self) -> bool:
        rest = self._decoder.unused_data.lstrip(b"\0") or self._source.read(_READ_BYTES)
        while rest and not rest.strip(b"\0"):
            rest = self._source.read(_READ_BYTES)  # stream padding, .xz format 2.2
        if not rest:
            return False
        self._decoder = _xz_decoder()
        self._pending = rest
        return True


class _ZstdStream:
    """A zstd file of any number of frames.

    zstandard's own stream readers do not tell a truncated frame from a whole one; its decompressor
    objects do, but give all output of one input at once.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame = self._context.decompressobj()
        self._frame_open = True
        self._input = memoryview(b"")
        self._output = memoryview(b"")

    def read(self, size: int) -> bytes:
        while not self._output:
            if not self._input:
                self._input = memoryview(self._source.read(_READ_BYTES))
            if not self._input:
                if self._frame_open:
                    raise EOFError
                return b""
            self._decode()
        piece, self._output = bytes(self._output[:size]), self._output[size:]
        return piece

    def _decode(self) -> None:
        if not self._frame_open:
            self._frame = self._context.decompressobj()
            self._frame_open = True
        fed, rest = self._input[:_ZSTD_INPUT_BYTES], self._input[_ZSTD_INPUT_BYTES:]
        self._output = memoryview(self._frame.decompress(fed))
        if self._frame.eof:
            self._frame_open = False
            unused = len(self._frame.unused_data)
            rest = self._input[len(fed) - unused :]
        self._input = rest


def _xz_decoder() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)


def _open_bzip2(source: BinaryIO) -> ByteStream:
    return bz2.BZ2File(source)


_DAMAGE = (OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)

_STREAMS: dict[Compression, Callable[[BinaryIO], ByteStream] | None] = {
    "none": None,
    "gz": _GzipStream,
    "bz2": _open_bzip2,
    "xz": _XzStream,
    "zst": _ZstdStream,
}
