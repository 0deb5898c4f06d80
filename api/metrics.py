"""What /metrics answers: put together anew for each request, from what all processes left to read.

Nothing is kept here but the account of space, which is expensive with many disks. METRICS.md has
every metric with its source, and what resets it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from stratocache import __version__
from stratocache.api import metric_catalogue as catalogue
from stratocache.api import readiness
from stratocache.api.metric_catalogue import Metric
from stratocache.api.request_counts import RequestCounts
from stratocache.cache.configuration import Configuration
from stratocache.fs import fetch_account, inventory
from stratocache.fs.counts import DURATION_BOUNDS_S, Counted, read_all
from stratocache.fs.manifest_sizes import shared_bytes
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.scrubbing import scrub_state
from stratocache.fs.space_meter import SpaceMeter
from stratocache.fs.state import Database
from stratocache.fs.supervisor_status import State, read_status
from stratocache.fs.tallies import tallies

Values = dict[tuple[str, ...], Any]
"""Values of one metric by those of its labels."""
_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Metrics:
    """Writes the metrics of one appliance; any thread may use it."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        meter: SpaceMeter,
        requests: RequestCounts,
    ) -> None:
        self._configuration = configuration
        self._db = db
        self._requests = requests
        self._directory = RunDirectory(configuration.run_dir)
        self._meter = meter

    def text(self, *, everything: bool) -> bytes:
        """Return all metrics in Prometheus' text format; without `everything` none that names an
        image or a disk."""
        registry = CollectorRegistry()
        registry.register(_Families(self._families(everything)))
        return generate_latest(registry)

    def _families(self, everything: bool) -> list[_Family]:
        self._requests.write()
        counted = read_all(self._directory.counts)
        found = list(_families(catalogue.COUNTED, lambda metric: _counted(counted, metric)))
        kept = tallies(self._db)
        found += _families(
            catalogue.TALLIED,
            lambda metric: {
                tuple(label.split(" ")) if metric.labels else (): value
                for label, value in kept.get(metric.source, {}).items()
            },
        )
        for metrics, values in (
            (catalogue.SPACE, self._space()),
            (catalogue.STATE, self._state()),
            (catalogue.PROCESSES, self._processes()),
        ):
            found += _families(metrics, lambda metric, values=values: values[metric.name])  # type: ignore[misc]
        if everything:
            found += _families(catalogue.DISKS, lambda metric: self._disks(counted, metric))
            in_use = self._in_use()
            found += _families(catalogue.IN_USE, lambda metric: in_use[metric.name])
        return found

    def _space(self) -> dict[str, Values]:
        account = self._meter.account()
        numbers = {
            "space_total_bytes": account.total_bytes,
            "space_free_bytes": account.free_bytes,
            "space_available_bytes": account.available_bytes,
            "space_promised_bytes": account.promised_bytes,
            "space_promise_limit_bytes": account.promise_limit_bytes,
            "disks_allocated_bytes": account.disk_allocated_bytes,
            "disks_size_bytes": account.disk_size_bytes,
            "cache_chunk_bytes": account.chunk_bytes,
            "cache_limit_bytes": self._configuration.cache.max_bytes,
            "cache_shared_bytes": shared_bytes(self._db, account.chunk_bytes),
            "quarantine_bytes": account.quarantine_bytes,
        }
        return {name: {(): number} for name, number in numbers.items()}

    def _state(self) -> dict[str, Values]:
        scrub = scrub_state(self._db)
        finished = scrub.finished_at
        return {
            "images": self._grouped("images", "state"),
            "images_pinned": self._number("images WHERE pinned"),
            "disks": self._grouped("disks", "state", "coalesce(form, 'none')"),
            "disks_with_problem": self._number("disks WHERE problem IS NOT NULL"),
            "snapshots": self._grouped("snapshots", "state"),
            "attachments": self._grouped("attachments", "state", "access"),
            "attachments_with_problem": self._number("attachments WHERE problem IS NOT NULL"),
            "operations_open": self._grouped(
                "operations WHERE state IN ('pending', 'running')", "kind", "state"
            ),
            "losses": self._grouped("losses", "kind"),
            "scrub_running": {(): int(scrub.state == "running")},
            "scrub_paused": {(): int(scrub.paused)},
            "scrub_last_finish_timestamp_seconds": {(): _seconds(finished) if finished else 0},
            "scrub_pass_damaged": {(): scrub.damaged},
            "scrub_pass_repaired": {(): scrub.repaired},
        }

    def _grouped(self, table: str, *columns: str) -> Values:
        named = ", ".join(columns)
        rows = self._db.rows(f"SELECT {named}, count(*) FROM {table} GROUP BY {named}")  # nosec B608 # no value in it
        return {tuple(row)[:-1]: tuple(row)[-1] for row in rows}

    def _number(self, table: str) -> Values:
        row = self._db.row(f"SELECT count(*) FROM {table}")  # nosec B608 # no value in it
        return {(): row[0] if row else 0}

    def _disks(self, counted: Counted, metric: Metric) -> Values:
        attached = {str(row["number"]): row["uuid"] for row in self._db.rows(_ATTACHED_DISKS)}
        return {
            (attached[number], operation): value
            for (number, operation), value in _counted(counted, metric).items()
            if number in attached
        }

    def _in_use(self) -> dict[str, Values]:
        found: dict[str, Values] = {metric.name: {} for metric in catalogue.IN_USE}
        for row in self._db.rows(_IMAGES_IN_USE):
            image = inventory.find_image(self._db, row["id"])
            if image is None:
                continue
            account, label = fetch_account.of_image(self._db, image), (image.id,)
            found["image_hits"][label] = account.hits
            found["image_misses"][label] = account.misses
            found["image_remote_bytes"][label] = account.remote_bytes
            found["image_wait_seconds"][label] = account.remote_wait_s
            found["image_local_bytes"][label] = account.local_bytes or 0
            found["image_size_bytes"][label] = image.size_bytes or 0
            if image.state == "provisional" and account.complete_in_s is not None:
                found["image_remaining_seconds"][label] = account.complete_in_s
        for row in self._db.rows(_ATTACHED_DISKS):
            disk = inventory.find_disk(self._db, row["uuid"])
            if disk is None:
                continue
            cost, disk_label = fetch_account.of_disk(self._db, disk), (disk.uuid,)
            found["disk_remote_bytes"][disk_label] = cost.remote_bytes
            found["disk_wait_seconds"][disk_label] = cost.remote_wait_s
            found["disk_boot_wait_seconds"][disk_label] = cost.boot_remote_wait_s
            found["disk_boot_remote_bytes"][disk_label] = cost.boot_remote_bytes
        return found

    def _processes(self) -> dict[str, Values]:
        found: dict[str, Values] = {metric.name: {} for metric in catalogue.PROCESSES}
        parts = readiness.parts(self._configuration, self._db)
        found["part_up"] = {(part,): int(not fault) for part, fault in parts.items()}
        found["build_info"] = {(__version__,): 1}
        status = read_status(self._directory.supervisor_status)
        if status is None:
            return found
        found["supervisor_state"] = {(state.value,): int(state is status.state) for state in State}
        for name, child in status.children.items():
            found["process_restarts"][(name,)] = child.restarts
            found["process_start_time_seconds"][(name,)] = child.started_at
            found["process_ready"][(name,)] = int(child.ready)
            found["process_last_pause_seconds"][(name,)] = child.pause_s
            found["process_pause_seconds"][(name,)] = child.paused_s
        return found


_ATTACHED_DISKS = "SELECT number, uuid FROM disks WHERE uuid IN (SELECT disk_uuid FROM attachments)"
_IMAGES_IN_USE = (
    "SELECT id FROM images WHERE state = 'provisional' "
    "OR id IN (SELECT image_id FROM attachments) OR id IN (SELECT base_image FROM disks "
    "WHERE uuid IN (SELECT disk_uuid FROM attachments) AND form IS NOT 'raw')"
)


class _Families(Collector):
    """What `generate_latest` wants."""

    def __init__(self, families: Sequence[_Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[_Family]:
        return self._families


def _counted(counted: Counted, metric: Metric) -> Values:
    """Return what processes have counted of a metric; what has other labels is of another version."""
    source = counted.durations if metric.kind == "histogram" else counted.counters
    return {
        key[1:]: value
        for key, value in source.items()
        if key[0] == metric.source and len(key) == 1 + len(metric.labels)
    }


def _families(
    metrics: Sequence[Metric], values_of: Callable[[Metric], Values]
) -> Iterator[_Family]:
    for metric in metrics:
        values = values_of(metric)
        if not metric.labels and not values and metric.kind != "histogram":
            values = {(): 0}
        yield _family(metric, values)


def _family(metric: Metric, values: Values) -> _Family:
    name = f"stratocache_{metric.name}"
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, metric.help, labels=metric.labels)
        for labels, durations in sorted(values.items()):
            cumulative, count = [], 0
            bounds = [*map(str, DURATION_BOUNDS_S), "+Inf"]
            for bound, number in zip(bounds, durations.counts, strict=True):
                count += number
                cumulative.append((bound, float(count)))
            histogram.add_metric(labels, cumulative, durations.sum_s)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(name, metric.help, labels=metric.labels)
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
