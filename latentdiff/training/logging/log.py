"""`log.jsonl`: one JSON object per line and logged step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path


class Log:
    """The log of a run that resumes from step `start`; lines of later steps are cut off."""

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with path.open("rb+") as file:
            size = 0
            for line in file:
                if _step(line) > start:
                    break
                size += len(line)
            file.truncate(size)
        self.path = path

    def write(self, record: Mapping[str, float]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step(line: bytes) -> float:
    """The step of a logged line; infinite for a line that a crash cut short."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
