"""Samples that are known to be bad: the list that `latentdiff data check` writes, and counts."""

import json
from collections.abc import Mapping
from pathlib import Path

from latentdiff.data.config import DataConfig

BAD_SAMPLES = "bad_samples.jsonl"  # what `latentdiff data check` writes
DUPLICATE = "duplicate name"  # the reason of a row whose image an earlier row has


class ListedBadSamples:
    """Looks up names, one after the other, in a list of bad samples."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons, self._seen = reasons, set[str]()

    def reason(self, name: str) -> str | None:
        """Why the next sample, of this name, is bad; of a duplicate name the first is good."""
        reason = self.reasons.get(name)
        if reason == DUPLICATE and name not in self._seen:
            self._seen.add(name)
            return None
        return reason


def read_bad_samples(config: DataConfig) -> dict[str, str]:
    """Names and reasons of what `latentdiff data check` found. Raises ValueError when broken."""
    path = config.bad_samples
    if path is None:
        path = Path(config.location()) / BAD_SAMPLES
        if not path.is_file():
            return {}
    reasons: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                reasons.setdefault(row["path"], row["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"bad_samples={str(path)!r} cannot be read: {error}") from error
    return reasons


def breakdown(reasons: Mapping[str, int]) -> str:
    """Counts by reason, the most frequent first, in words."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)
