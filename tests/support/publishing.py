"""Images published for whole-appliance tests: a file, its signed entry in a folder, its endorser."""

import gzip
import hashlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stratocache.cache import publication
from stratocache.cache.entry import Compression, ImageFormat
from stratocache.cache.identifier import encode
from stratocache.cache.indexing import index_image
from stratocache.cache.publication import Description
from support.documents import EMAIL, make_endorser, shelve
from support.web_server import Handler, begin_file, serving

_PIECE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Published:
    """One image that a catalogue of the kind `file:` offers."""

    endpoint: str
    fingerprint: str
    identifier: str
    sha256: str
    image: Path
    """The raw bytes."""
    source: Path
    """The file that the entry's locations serve."""


def random_image(path: Path, size_bytes: int, *, seed: int = 1) -> None:
    """Write an image of incompressible stretches and holes."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for offset in range(0, size_bytes, 1024**2):
            if chance.random() < 0.75:
                file.seek(offset)
                file.write(chance.randbytes(min(1024**2, size_bytes - offset)))


def publish_image(
    folder: Path,
    size_bytes: int,
    *,
    compression: Compression = "none",
    image_format: ImageFormat = "raw",
    locations: Sequence[str] | None = None,
    seed: int = 1,
    index_url: str | None = None,
) -> Published:
    """Make an image below `folder` and publish it; without locations it is read as a local file.

    With `index_url`, the URL of `folder`, its chunk index and chunk store lie beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / f"image-{seed}"
    random_image(image, size_bytes, seed=seed)
    source = image
    if compression == "gz":
        source = image.with_suffix(".gz")
        with image.open("rb") as raw, gzip.open(source, "wb", compresslevel=1) as packed:
            shutil.copyfileobj(raw, packed, _PIECE_BYTES)
    return publish_file(
        folder, image, source=source, compression=compression, image_format=image_format,
        locations=locations, index_url=index_url,
    )  # fmt: skip


def publish_file(
    folder: Path,
    image: Path,
    *,
    source: Path | None = None,
    compression: Compression = "none",
    image_format: ImageFormat = "raw",
    locations: Sequence[str] | None = None,
    index_url: str | None = None,
    indexed: Path | None = None,
) -> Published:
    """Publish a raw file, whose locations serve `source`, by an entry below `folder`.

    `indexed` is what the index is made of, when the endorser contradicts himself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = source or image
    measurement = publication.measure(image)
    created = publication.now()
    description = Description(
        locations=tuple(locations) if locations is not None else (source.as_uri(),),
        compression=compression,
        format=image_format,
    )
    if index_url is not None:
        made = index_image(indexed or image, folder)
        url = f"{index_url}/{made.index.name}"
        description = replace(
            description, index=publication.endorsed_index(url, made.index, measurement)
        )
    endorser = make_endorser()
    unsigned = publication.build_metadata(measurement, description, created=created)
    signed = publication.endorse(unsigned, endorser.credentials, created=created)
    identifier = encode(measurement.digests["sha1"])
    shelf = folder / "entries"
    shelve(shelf, signed, identifier, EMAIL, created)
    with image.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Published(shelf.as_uri(), endorser.fingerprint, identifier, sha256, image, source)


@contextmanager
def slow_origin(folder: Path, bytes_per_s: int) -> Iterator[str]:
    """Serve the files of a folder over HTTP with ranges, at a limited rate; yields the base URL."""

    class Slow(Handler):
        def do_GET(self) -> None:
            found = begin_file(self, folder)
            if found is None:
                return
            path, start, end = found
            with path.open("rb") as file:
                file.seek(start)
                for offset in range(start, end, _PIECE_BYTES):
                    time.sleep(_PIECE_BYTES / bytes_per_s)
                    self.wfile.write(file.read(min(_PIECE_BYTES, end - offset)))

    with serving(Slow) as url:
        yield url
