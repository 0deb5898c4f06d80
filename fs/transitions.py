"""Changes of a disk that nobody has open: made, frozen as a file, rolled back, promoted, adopted.

Each makes its files durable first, then has one step that decides, then removes what is nothing any
more. A crash leaves the disk as it was or as it is to be, and doing it again ends it. Which step
decides is in CRASH.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from stratocache.cache.errors import Conflict, NotFound
from stratocache.fs.bitmap import HEADER_BYTES, read_header
from stratocache.fs.layers import FIRST_LAYER, LAYOUT, RAW, RAW_DATA, DiskFiles, Layout
from stratocache.fs.stack import Layer

_FIRST_BITMAP = "bitmap"
"""Beside `data` and without a layout: an overlay of the first release."""


def create(files: DiskFiles, size_bytes: int, base: str | None) -> None:
    """Make an overlay without a block in an empty directory, durably but for the directory's name.

    Raises `OSError`.
    """
    Layer.create(files, FIRST_LAYER, size_bytes)
    files.storage.sync_directory(files.directory)
    files.write_layout(Layout(size_bytes, FIRST_LAYER, None, None, base))


def freeze_raw(files: DiskFiles) -> None:
    """Make a raw disk an overlay without a block over its own file, frozen; done twice is no error.

    Nobody may write the file any more. Raises `OSError`, `NotFound` (`disk-unknown`), and
    `Conflict` (`disk-in-use`) for an overlay that is open.
    """
    if files.layout() is not None:
        files.storage.sync_directory(files.directory)
        return
    _refuse_first_release(files)
    try:
        data = files.storage.open_file(files.data(RAW), exclusive=False)
    except FileNotFoundError:
        raise _unknown(files) from None
    try:
        data.fdatasync()
        size_bytes = data.size()
    finally:
        data.close()
    _make_layer(files, FIRST_LAYER, size_bytes)
    with files.restoring(None):
        files.write_layout(Layout(size_bytes, FIRST_LAYER, RAW, size_bytes, None))


def rollback(files: DiskFiles, size_bytes: int, base: str) -> None:
    """Forget all that was written, overlay or raw, and begin anew over a base; it may be repeated.

    The sizes are the base's. Raises `OSError`, `NotFound` (`disk-unknown`), and `Conflict`:
    `disk-in-use`, or `snapshot-pending` when a frozen layer has not become a snapshot yet.
    """
    layout = files.layout()
    if layout is None and RAW_DATA not in files.storage.names(files.directory):
        raise _unknown(files)
    with _locked(files, layout):
        if layout is not None and layout.frozen is not None:
            raise _pending(files)
        name = FIRST_LAYER if layout is None else layout.next_layer
        _make_layer(files, name, size_bytes)
        changed = Layout(size_bytes, name, None, None, base)
        with files.restoring(layout):
            files.write_layout(changed)
        with files.tidying():
            if layout is not None:
                files.remove_layer(layout.top)
            files.sweep(changed)


def finish_promotion(files: DiskFiles) -> None:
    """Make an overlay raw whose every block is in its top layer; done twice is no error.

    Raises `OSError`, `NotFound` (`disk-unknown`), and `Conflict`: `disk-in-use`,
    `snapshot-pending`, `promotion-incomplete`.
    """
    layout = files.layout()
    storage = files.storage
    if layout is None:
        if RAW_DATA not in storage.names(files.directory):
            raise _unknown(files)
        _refuse_first_release(files)
        storage.sync_directory(files.directory)
        with files.tidying():
            files.sweep(None)
        return
    if layout.frozen is not None:
        raise _pending(files)
    top = Layer(files, layout.top, layout.size_bytes)
    try:
        if not top.bitmap.is_full(layout.size_bytes):
            raise Conflict(
                "promotion-incomplete", f"{files.directory} still needs its base; fill it first."
            )
        # a growth that a crash ended may have left it longer than the disk
        top.cut(layout.size_bytes)
        top.sync_now()
    finally:
        top.close()
    # a second name, so that the file is whole under both while the layout decides
    storage.remove(files.data(RAW))
    storage.link(files.data(layout.top), files.data(RAW))
    storage.sync_directory(files.directory)
    with files.restoring(layout):
        files.remove_layout()
    with files.tidying():
        files.remove_layer(layout.top)
        files.sweep(None)


def is_first_release(files: DiskFiles) -> bool:
    """Tell whether the files are an overlay of the first release: `data`, `bitmap`, no layout."""
    names = set(files.storage.names(files.directory))
    return {RAW_DATA, _FIRST_BITMAP} <= names and LAYOUT not in names


def adopt(files: DiskFiles, base: str) -> None:
    """Give an overlay of the first release its layout; done twice, or on another, is no error.

    Raises `OSError`, `NotVerified` (`overlay-damaged`), `Internal` (`overlay-too-new`).
    """
    if not is_first_release(files):
        return
    storage = files.storage
    path = files.directory / _FIRST_BITMAP
    bitmap = storage.open_file(path, exclusive=True)
    try:
        header = bitmap.pread(HEADER_BYTES, 0) if bitmap.size() >= HEADER_BYTES else b""
        size_bytes, _ = read_header(header, path)
        for old, new in (
            (files.data(RAW), files.data(FIRST_LAYER)),
            (path, files.bitmap(FIRST_LAYER)),
            (files.first_live, files.live(FIRST_LAYER)),
        ):
            storage.remove(new)
            # there is no live bitmap when the host has booted since
            with suppress(FileNotFoundError):
                storage.link(old, new)
        storage.sync_directory(files.directory)
        layout = Layout(size_bytes, FIRST_LAYER, None, None, base)
        files.write_layout(layout)
        with files.tidying():
            storage.remove(files.first_live)
            files.sweep(layout)
    finally:
        bitmap.close()


def _make_layer(files: DiskFiles, name: str, size_bytes: int) -> None:
    # these names may have meant something to a layout whose removal was not synced
    files.storage.sync_directory(files.directory)
    files.remove_layer(name)
    Layer.create(files, name, size_bytes)
    files.storage.sync_directory(files.directory)


@contextmanager
def _locked(files: DiskFiles, layout: Layout | None) -> Iterator[None]:
    if layout is None:
        yield
        return
    held = files.storage.open_file(files.bitmap(layout.top), exclusive=True)
    try:
        yield
    finally:
        held.close()


def _refuse_first_release(files: DiskFiles) -> None:
    if is_first_release(files):
        raise Conflict(
            "overlay-not-adopted", f"{files.directory} has the format of the first release yet."
        )


def _unknown(files: DiskFiles) -> NotFound:
    return NotFound("disk-unknown", f"There is no disk in {files.directory}.")


def _pending(files: DiskFiles) -> Conflict:
    return Conflict(
        "snapshot-pending", f"A snapshot of {files.directory} is being made; wait for its end."
    )
