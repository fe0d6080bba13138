"""What an alert is, and how bad it can be."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from rlhf_core.alerting.judges import Settings
from rlhf_core.alerting.series import NONFINITE

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
"""From the least to the worst."""
Thresholds = Mapping[str, Settings]
"""A table of settings for each rule, as ``alerts.toml`` has it."""


@dataclass(frozen=True)
class Alert:
    """One thing that is going wrong, or was."""

    name: str
    """The rule's name."""
    severity: Severity
    metric: str
    """The metric that the rule speaks of; of several that are not finite, the first that was not."""
    first_step: int
    """The first bad step."""
    raised_step: int
    """The step at which it had been bad for long enough."""
    step: int
    """The last bad step."""
    value: float | None
    """The metric at the last bad step; None where it is not finite."""
    threshold: float | None
    """What it should have stayed within, as of the step at which the alert was raised; None for what is not finite."""
    moved_with: tuple[str, ...]
    """Metrics that left their range of the steps before at the same time, the farthest first; of an alert on what is
    not finite, the others that were not, then or later."""
    cause: str
    remedy: str
    evidence: str
    """The figures, in a line."""
    standing: bool = True
    """False when the metric has been good again for long enough."""
    synthetic: bool = False
    """True when it is an example, and of no run."""

    def to_json(self) -> dict[str, Any]:
        """Return the alert as a JSON object."""
        return asdict(self) | {"moved_with": list(self.moved_with)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Alert":
        """Return the alert of a JSON object.

        Raises:
            ValueError: a field is missing, or one is unknown.
        """
        known = {item.name for item in fields(cls)}
        if row.keys() != known:
            raise ValueError(f"an alert has {', '.join(sorted(known))}; these differ: {sorted(row.keys() ^ known)}")
        return cls(**{**row, "moved_with": tuple(row["moved_with"])})


def is_nonfinite(alert: Alert) -> bool:
    """Return whether an alert is about values that are not finite, and not about how large one is."""
    return alert.name == NONFINITE


def severity_of(settings: Settings) -> Severity:
    """Return the severity that a rule's settings give its alerts."""
    return next(one for one in SEVERITIES if one == settings["severity"])
