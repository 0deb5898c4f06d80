"""Reading Prometheus' text format with the library's own parser."""

from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def families(text: str) -> dict[str, Family]:
    """Parse what /metrics answers, by the names as they are written in it."""
    found = {}
    for family in text_string_to_metric_families(text):
        end = "_total" if family.type == "counter" else ""
        found[family.name + end] = family
    return found


def samples(text: str) -> Samples:
    """Return every sample by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(text).values()
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    """Return one sample; 0 for one that is not there yet would hide mistakes, so it raises."""
    return samples(text)[f"stratocache_{name}", tuple(sorted(labels.items()))]
