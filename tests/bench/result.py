"""One measured figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Result:
    """Samples of one figure, and the goal that it is held against."""

    name: str
    unit: str
    samples: Sequence[float]
    goal: float | None = None
    """None of what is only told."""
    at_least: bool = True
    """Whether the goal is a lower bound; else it is an upper one."""

    @property
    def value(self) -> float:
        """The median."""
        return median(self.samples)

    @property
    def met(self) -> bool:
        """Whether the median reaches the goal, if there is one."""
        if self.goal is None:
            return True
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def record(self) -> dict[str, Any]:
        """Return what `build/bench.json` holds of it."""
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "goal": self.goal,
            "met": self.met,
            "samples": [round(sample, 4) for sample in self.samples],
            "spread": [round(min(self.samples), 4), round(max(self.samples), 4)],
        }

    def line(self) -> str:
        """Return a row of the printed table."""
        figures = (
            f"{self.name:58} {self.value:9.3f} {self.unit:12} "
            f"({min(self.samples):.3f} - {max(self.samples):.3f}, n={len(self.samples)})"
        )
        if self.goal is None:
            return figures
        sign = "≥" if self.at_least else "≤"
        return f"{figures} goal {sign} {self.goal:g}  {'met' if self.met else 'MISSED'}"
