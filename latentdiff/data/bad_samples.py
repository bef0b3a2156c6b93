"""Reads the list of bad samples that `latentdiff data check` writes, and words their counts."""

import json
from collections.abc import Mapping
from pathlib import Path

from latentdiff.data.config import DataConfig

BAD_SAMPLES = "bad_samples.jsonl"  # what `latentdiff data check` writes
DUPLICATE = "duplicate name"  # the reason of a row that names the same image as an earlier row


class ListedBadSamples:
    """Looks up the names of samples, in the order of the data, in a list of bad samples."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons, self._seen = reasons, set[str]()

    def reason(self, name: str) -> str | None:
        """Return why the next sample, called `name`, is bad, or None for a good sample.

        Where several samples share a name listed as DUPLICATE, the first of them is good.
        """
        reason = self.reasons.get(name)
        if reason == DUPLICATE and name not in self._seen:
            self._seen.add(name)
            return None
        return reason


def read_bad_samples(config: DataConfig) -> dict[str, str]:
    """Read the bad samples that `latentdiff data check` found: their names and reasons.

    Without a list the result is empty. Raises ValueError for a list that cannot be read.
    """
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
    """Format counts by reason, the most frequent first: "3 cannot be decoded, 1 too small"."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)
