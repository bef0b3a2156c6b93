"""Is a run that is killed over and over the same as one that is left alone?

Kills a toy run (two networks, the loop and the checkpoints of real ones) with SIGKILL at random
times, starts it again each time, and compares the SHA-256 of all that its last checkpoint holds
with that of a run that nobody killed. Prints one line of JSON; ends with 1 if they differ.

The processes are forked from one that has the imports behind it. How long one takes to start and to
train twelve steps is measured first, and kills come evenly over twice that time: in the start, in
steps and in saves, of which there is one after every third step.

    python benchmarks/kills.py --kills 200
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.faulty import Fault, Toy, output
from support.harness import left_over, newest, run, start, wait

from latentdiff.training.checkpoint_files import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    count = arguments.processes
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        # As many steps as it takes to be killed so often.
        toy = Toy(Path(home) / "killed", steps=100_000, fault=Fault("slow", seconds=0.01))
        life = statistics.median(lifetime(toy, Path(home) / f"{i}", count) for i in range(5))
        resumed_at, places = [0], Counter[str]()
        for _ in range(arguments.kills):
            noted, started = size(toy.folder / "notes-0.jsonl"), time.time()
            processes = start(toy, count)
            time.sleep(draw.uniform(0, 2 * life))
            processes[draw.randrange(count)].kill()
            codes = wait(processes)
            if -signal.SIGKILL not in codes:
                sys.exit(f"the run ended by itself: {codes}\n{output(toy.folder)[-2000:]}")
            in_steps = size(toy.folder / "notes-0.jsonl") > noted
            in_save = any(path.stat().st_mtime > started for path in left_over(toy.folder))
            places["save" if in_save else "steps" if in_steps else "start"] += 1
            resumed_at.append(newest(toy.folder))
        last = resumed_at[-1] + 3
        killed = replace(toy, steps=last, fault=Fault())
        whole = replace(killed, folder=Path(home) / "whole", checkpoint_every=last)
        for each in (killed, whole):
            if any(wait(start(each, count), seconds=3600)):
                sys.exit(output(each.folder)[-2000:])
        found, expected = (
            verify(folder / "checkpoints" / f"step-{last}")["files"]
            for folder in (killed.folder, whole.folder)
        )
    record = {
        "kills": arguments.kills,
        "in": dict(places),
        "processes": count,
        "seconds_of_a_run_of_12_steps": round(life, 2),
        "steps": last,
        "runs_that_got_further": sum(b > a for a, b in pairwise(resumed_at)),
        "seconds": round(time.perf_counter() - begun, 1),
        "same_bytes": found == expected,
    }
    print(json.dumps(record))
    sys.exit(found != expected)


def lifetime(toy: Toy, folder: Path, count: int) -> float:
    """Seconds that a run of twelve steps takes from its start to its end."""
    begun = time.perf_counter()
    if any(run(replace(toy, folder=folder, steps=12), count)):
        sys.exit(output(folder)[-2000:])
    return time.perf_counter() - begun


def size(path: Path) -> int:
    """Bytes; 0 for no file."""
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    main()
