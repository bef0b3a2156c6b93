"""Is a run that is killed over and over the same as one that is left alone?

Kills a toy run (two networks, the loop and the checkpoints of real ones) with SIGKILL at random
times, starts it again each time, and compares the SHA-256 of all that its last checkpoint holds
with that of a run that nobody killed. Prints one line of JSON; ends with 1 if they differ.

    python benchmarks/kills.py --kills 200
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faulty import Fault, Toy, output, start, wait

from latentdiff.training.checkpoint import checkpoints, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--mean_wait", type=float, default=0.8, help="seconds a run has, on average"
    )
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as home:
        # As many steps as it takes to be killed so often, one checkpoint in every third step.
        toy = Toy(Path(home) / "killed", steps=100_000, fault=Fault("slow", seconds=0.01))
        begun, resumed_at = time.perf_counter(), [0]
        wait(start(replace(toy, folder=Path(home) / "short", steps=12), arguments.processes))
        short = time.perf_counter() - begun  # mostly start-up: half of the runs get beyond it
        for _ in range(arguments.kills):
            processes = start(toy, arguments.processes)
            time.sleep(draw.uniform(0, 2 * short))
            processes[draw.randrange(arguments.processes)].kill()
            codes = wait(processes)
            if -signal.SIGKILL not in codes:
                sys.exit(f"the run ended by itself: {codes}\n{output(toy.folder)[-2000:]}")
            resumed_at.append(newest(toy.folder))
        last = resumed_at[-1] + 3
        killed = replace(toy, steps=last, fault=Fault())
        whole = replace(killed, folder=Path(home) / "whole", checkpoint_every=last)
        for each in (killed, whole):
            if any(wait(start(each, arguments.processes), seconds=3600)):
                sys.exit(output(each.folder)[-2000:])
        found, expected = (
            verify(folder / "checkpoints" / f"step-{last}")["files"]
            for folder in (killed.folder, whole.folder)
        )
    record = {
        "kills": arguments.kills,
        "processes": arguments.processes,
        "steps": last,
        "runs_that_got_further": sum(b > a for a, b in pairwise(resumed_at)),
        "seconds": round(time.perf_counter() - begun, 1),
        "same_bytes": found == expected,
    }
    print(json.dumps(record))
    sys.exit(found != expected)


def newest(folder: Path) -> int:
    return max((step for step, _ in checkpoints(folder / "checkpoints")), default=0)


if __name__ == "__main__":
    main()
