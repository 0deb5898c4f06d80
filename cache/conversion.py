"""qcow2 to raw, by `qemu-img` in a subprocess with resource limits.

The header is judged before any of QEMU's code sees the file: a backing file or an external data
file could name any path of this host. Formats are always forced, never probed.
Source: QEMU, docs/interop/qcow2.txt; qemu-img(1); prlimit(1).
"""

import json
import signal
from functools import partial
from pathlib import Path
from subprocess import DEVNULL

import trio

from stratocache.cache.errors import NoSpace, NotVerified, StratocacheError
from stratocache.cache.qcow2 import HEADER_BYTES, backing_error, format_error, judge_header
from stratocache.cache.space import Space, no_space

_MEMORY_BYTES = 2 * 1024**3
_INSPECT_CPU_S = 10
_INSPECT_TIMEOUT_S = 30
_INSPECT_OUTPUT_BYTES = 1024**2
_CONVERT_CPU_S = 4 * 3600
_CONVERT_TIMEOUT_S = 8 * 3600
_SPACE_INTERVAL_S = 0.5
_STDERR_BYTES = 400


async def inspect(container: Path, *, image_bytes_max: int) -> int:
    """Return the virtual size of a qcow2 file after judging it.

    Raises `NotVerified`: `image-format` (not qcow2, encrypted, damaged, unknown features),
    `image-backing-file` (a backing file or an external data file), `image-too-large`.
    """
    size_bytes = await trio.to_thread.run_sync(_judge_header, container, image_bytes_max)
    report = container.with_suffix(".json")
    try:
        with report.open("wb") as output:
            await _qemu_img(
                ["info", "-f", "qcow2", "--output=json", str(container)],
                stdout=output.fileno(), cpu_s=_INSPECT_CPU_S, timeout_s=_INSPECT_TIMEOUT_S,
                file_bytes=_INSPECT_OUTPUT_BYTES,
            )  # fmt: skip
        facts = json.loads(report.read_text(encoding="utf-8"))
    except ValueError:
        raise format_error("qemu-img describes it at too great a length") from None
    finally:
        report.unlink(missing_ok=True)
    specific = facts.get("format-specific", {}).get("data", {})
    if "backing-filename" in facts or "data-file" in specific:
        raise backing_error()
    if facts.get("encrypted"):
        raise format_error("it is encrypted")
    if facts.get("virtual-size") != size_bytes:
        raise format_error("qemu-img reads another virtual size than the header has")
    return size_bytes


async def convert(container: Path, image: Path, *, size_bytes: int, space: Space) -> None:
    """Write the virtual disk of an inspected qcow2 file as a sparse raw file.

    Raises `NotVerified` (`image-format`) for a damaged file, `NoSpace` (`no-space`) as soon as the
    reserve is touched. The output is the caller's to remove.
    """
    command = ["convert", "-f", "qcow2", "-O", "raw", "-S", "4k", str(container), str(image)]
    failures: list[StratocacheError] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_space, space, nursery.cancel_scope, failures)
        try:
            await _qemu_img(
                command, stdout=DEVNULL, cpu_s=_CONVERT_CPU_S, timeout_s=_CONVERT_TIMEOUT_S,
                file_bytes=size_bytes,
            )  # fmt: skip
        except NotVerified as error:
            full = "No space left" in error.message
            failures.append(no_space(image.parent, "converting the image") if full else error)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    if (await trio.Path(image).stat()).st_size != size_bytes:
        raise format_error("it converts to another size than its header says")


async def _watch_space(
    space: Space, scope: trio.CancelScope, failures: list[StratocacheError]
) -> None:
    while not failures:
        try:
            space.require(0)
        except NoSpace as error:
            failures.append(error)
            scope.cancel()
        await trio.sleep(_SPACE_INTERVAL_S)


async def _qemu_img(
    arguments: list[str], *, stdout: int, cpu_s: int, timeout_s: float, file_bytes: int
) -> None:
    limits = [
        f"--as={_MEMORY_BYTES}", f"--cpu={cpu_s}", f"--fsize={file_bytes}", "--core=0",
    ]  # fmt: skip
    command = ["prlimit", *limits, "--", "qemu-img", *arguments]
    run = partial(
        trio.run_process, command, stdin=DEVNULL, stdout=stdout, capture_stderr=True, check=False
    )
    result = None
    with trio.move_on_after(timeout_s):
        result = await run()
    if result is None:
        raise NotVerified("image-format", f"qemu-img did not end within {timeout_s:.0f} s.")
    if result.returncode:
        text = result.stderr.decode("utf-8", "replace").strip()[-_STDERR_BYTES:]
        if result.returncode < 0:
            text = f"{signal.Signals(-result.returncode).name} {text}"
        raise NotVerified(
            "image-format", f"qemu-img cannot read the image: {text}; check the source."
        )


def _judge_header(container: Path, image_bytes_max: int) -> int:
    with container.open("rb") as file:
        return judge_header(file.read(HEADER_BYTES), image_bytes_max=image_bytes_max).size_bytes
