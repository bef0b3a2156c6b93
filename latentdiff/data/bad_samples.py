"""Reads the list of bad samples that `latentdiff data check` writes, and words their counts."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.data.config import DataConfig

BAD_SAMPLES = "bad_samples.jsonl"  # what `latentdiff data check` writes
JUDGED_BY = {
    "too small": ("image_size", "bucket_step", "max_aspect", "upscale_limit"),
    "too large": ("max_megapixels",),
    "animated": ("first_frame",),
}
"""Options that decide whether a sample is bad, by the reason."""
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

    Without a list the result is empty. What was bad by other options, such as too small for another
    image_size, is not believed, with a warning. Raises ValueError for a list that cannot be read.
    """
    path = config.bad_samples
    if path is None:
        path = Path(config.location()) / BAD_SAMPLES
        if not path.is_file():
            return {}
    reasons: dict[str, str] = {}
    stale, current = Counter[str](), {reason: judged_by(reason, config) for reason in JUDGED_BY}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                options = row.get("options")
                if options and options != current.get(row["reason"]):
                    stale[row["reason"]] += 1
                else:
                    reasons.setdefault(row["path"], row["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"bad_samples={str(path)!r} cannot be read: {error}") from error
    if stale:
        warnings.warn(
            f"{path} lists {breakdown(stale)} by other options than these, which is not believed; "
            "`latentdiff data check` with these options writes it anew",
            stacklevel=2,
        )
    return reasons


def judged_by(reason: str, config: DataConfig) -> dict[str, Any] | None:
    """Return the options by which a sample is bad for that reason; None if it is bad by itself."""
    names = JUDGED_BY.get(reason)
    return None if names is None else {name: getattr(config, name) for name in names}


def advice(bad: int, total: int) -> str:
    """Say what to do about too many bad samples: mend them, or go on without them."""
    allowed = min(1.0, math.ceil(100 * bad / max(1, total)) / 100)
    return f"mend or remove them, or go on without them by --max_bad {allowed:g}"


def breakdown(reasons: Mapping[str, int]) -> str:
    """Format counts by reason, the most frequent first: "3 cannot be decoded, 1 too small"."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)
