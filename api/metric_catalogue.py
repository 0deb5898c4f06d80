"""Every metric of /metrics: its name, kind, meaning and labels. METRICS.md says the same to people.

Names follow Prometheus' rules: base units, `_total` for what only grows. The names of counters are
without that end here.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    kind: Kind
    name: str
    """Without `stratocache_`, and without `_total`."""
    help: str
    labels: tuple[str, ...] = ()
    source: str = ""
    """Its name among what processes count (`fs.counts`) or among `tallies`, if it is from there."""

    @property
    def full_name(self) -> str:
        """As it is written."""
        end = "_total" if self.kind == "counter" else ""
        return f"stratocache_{self.name}{end}"


def _counter(name: str, help_: str, *labels: str, source: str = "") -> Metric:
    return Metric("counter", name, help_, labels, source)


def _gauge(name: str, help_: str, *labels: str) -> Metric:
    return Metric("gauge", name, help_, labels)


COUNTED: tuple[Metric, ...] = (
    _counter("http_requests", "Requests to the API.", "method", "route", "status",
             source="http_requests"),
    Metric("histogram", "http_request_duration_seconds",
           "Time until the head of the answer, waiting that was asked for included.",
           ("method", "route"), "http_duration"),
    Metric("histogram", "block_request_duration_seconds",
           "Time of reads, writes and flushes that blockd answered, of overlays and images.",
           ("operation",), "io_duration"),
    _counter("block_request_errors", "Reads, writes and flushes that blockd answered by an error.",
             "operation", source="io_errors"),
    Metric("histogram", "reconcile_duration_seconds", "Time of the reconciler's passes.", (),
           "reconcile_duration"),
    _counter("chunk_verifications", "Chunks hashed and found right.", source="chunk_verifications"),
    _counter("chunks_quarantined", "Chunks found damaged and moved to quarantine.",
             source="chunks_quarantined"),
    _counter("scrub_read_bytes", "Bytes that scrubber and verification read again.",
             source="scrub_read_bytes"),
)  # fmt: skip
"""From the files of RUN_DIR/counts."""

DISKS: tuple[Metric, ...] = (
    _counter("disk_requests", "Requests of an attached overlay disk.", "disk", "operation",
             source="disk_requests"),
    _counter("disk_transferred_bytes", "Bytes read and written of an attached overlay disk.",
             "disk", "operation", source="disk_bytes"),
    _counter("disk_request_seconds", "Time that requests of an attached overlay disk took together.",
             "disk", "operation", source="disk_seconds"),
    _counter("disk_request_errors", "Requests of an attached overlay disk answered by an error.",
             "disk", "operation", source="disk_errors"),
)  # fmt: skip
"""The same, by disk; shown to operators, as all that names a disk."""

TALLIED: tuple[Metric, ...] = (
    _counter("fetch_remote_bytes", "Bytes moved from origins and peers, as they sent them.",
             source="remote_bytes"),
    _counter("fetch_peer_bytes", "Of fetch_remote_bytes, those that peers sent.",
             source="peer_bytes"),
    _counter("fetch_wait_seconds", "Time that readers waited for chunks to be fetched, together.",
             source="remote_wait_s"),
    _counter("fetch_chunks", "Chunks that were fetched singly, for a reader or in the background.",
             "purpose", source="chunks"),
    _counter("fetch_requests", "Requests for single chunks by how they ended.", "outcome",
             source="requests"),
    _counter("cache_hits", "Reads of chunks that were here.", source="hits"),
    _counter("cache_hit_bytes", "Bytes read of chunks that were here.", source="hit_bytes"),
    _counter("cache_misses", "Reads of chunks that were fetched while the reader waited.",
             source="misses"),
    _counter("cache_miss_bytes", "Bytes read of chunks that were fetched while the reader waited.",
             source="miss_bytes"),
    _counter("cache_saved_bytes", "Bytes of images that were here when a launch, a clone or a "
             "fetch asked for them.", source="cache_saved_bytes"),
    _counter("dedup_saved_bytes", "Bytes of images that other images' chunks provided, so that "
             "nobody fetched them.", source="dedup_saved_bytes"),
    _counter("cache_evicted_bytes", "Bytes freed by eviction.", source="evicted_bytes"),
    _counter("events", "Events by kind.", "kind", source="events"),
    _counter("operations", "Operations that have ended.", "kind", "state", source="operations"),
    _counter("operation_seconds", "Time from the request to the end of operations, together.",
             "kind", source="operation_seconds"),
)  # fmt: skip
"""From the table `tallies` of the state database."""

SPACE: tuple[Metric, ...] = (
    _gauge("space_total_bytes", "Size of the file system of the state directory."),
    _gauge("space_free_bytes", "Free bytes of that file system."),
    _gauge("space_available_bytes", "Free bytes less the reserve."),
    _gauge("space_promised_bytes", "Bytes that disks may still have to be given."),
    _gauge("space_promise_limit_bytes", "Bytes that may be promised."),
    _gauge("disks_allocated_bytes", "Bytes that disks and snapshots take."),
    _gauge("disks_size_bytes", "Bytes of all disks when full."),
    _gauge("cache_chunk_bytes", "Bytes of all chunks."),
    _gauge("cache_limit_bytes", "Bytes that all chunks may have; 0 without a limit."),
    _gauge("cache_shared_bytes", "Bytes that images and snapshots would take more, if each had "
           "chunks of its own."),
    _gauge("quarantine_bytes", "Bytes in quarantine."),
)  # fmt: skip
"""From the account of space."""

STATE: tuple[Metric, ...] = (
    _gauge("images", "Images by state.", "state"),
    _gauge("images_pinned", "Images that are never evicted."),
    _gauge("disks", "Disks by state and form.", "state", "form"),
    _gauge("disks_with_problem", "Disks whose files something is wrong with."),
    _gauge("snapshots", "Snapshots by state.", "state"),
    _gauge("attachments", "Attachments by state and access.", "state", "access"),
    _gauge("attachments_with_problem", "Attachments that are not yet what they should be."),
    _gauge("operations_open", "Operations that have not ended, by kind and state.", "kind", "state"),
    _gauge("losses", "Chunks and manifests that are damaged or gone and that no origin has.",
           "kind"),
    _gauge("scrub_running", "1 while the scrubber reads."),
    _gauge("scrub_paused", "1 while the scrubber is paused."),
    _gauge("scrub_last_finish_timestamp_seconds", "When the last whole pass of the scrubber ended; "
           "0 when there was none."),
    _gauge("scrub_pass_damaged", "What the present or last pass found damaged or missing."),
    _gauge("scrub_pass_repaired", "What of that was brought back."),
)  # fmt: skip
"""From the rows of the state database, and its scrub row."""

IN_USE: tuple[Metric, ...] = (
    _counter("image_hits", "As cache_hits, of an image in use.", "image"),
    _counter("image_misses", "As cache_misses, of an image in use.", "image"),
    _counter("image_remote_bytes", "As fetch_remote_bytes, of an image in use.", "image"),
    _counter("image_wait_seconds", "As fetch_wait_seconds, of an image in use.", "image"),
    _gauge("image_local_bytes", "Bytes here of an image in use.", "image"),
    _gauge("image_size_bytes", "Bytes of an image in use.", "image"),
    _gauge("image_remaining_seconds", "When a provisional image is here at its present rate; absent "
           "while nobody knows.", "image"),
    _counter("disk_remote_bytes", "Bytes fetched because an attached disk waited.", "disk"),
    _counter("disk_wait_seconds", "Time that reads of an attached disk waited for remote bytes.",
             "disk"),
    _gauge("disk_boot_wait_seconds", "The same since the disk was attached.", "disk"),
    _gauge("disk_boot_remote_bytes", "Bytes fetched for it since then.", "disk"),
)  # fmt: skip
"""By image and disk, of those in use: attached, or on their way; for operators."""

PROCESSES: tuple[Metric, ...] = (
    _counter("process_restarts", "Starts after the first.", "process"),
    _gauge("process_start_time_seconds", "When a process started, since the epoch.", "process"),
    _gauge("process_ready", "1 when a process does its work.", "process"),
    _gauge("process_last_pause_seconds", "From the end of the process before until this one was "
           "ready.", "process"),
    _counter("process_pause_seconds", "All such pauses together.", "process"),
    _gauge("supervisor_state", "1 for the state that the supervisor is in.", "state"),
    _gauge("part_up", "1 when a part of the appliance answers; as /readyz.", "part"),
    _gauge("build_info", "1, with the version.", "version"),
)  # fmt: skip
"""From RUN_DIR/supervisor.json, and by looking."""

METRICS = (*COUNTED, *DISKS, *TALLIED, *SPACE, *STATE, *IN_USE, *PROCESSES)
