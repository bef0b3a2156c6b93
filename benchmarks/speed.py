"""How fast are drawing and training, beside diffusers at its best and the machine's own ceiling?

One process, the same weights, prompts, noise and steps; rounds are interleaved, and of each variant
the median and the ratio of paired medians with its 95 % interval are printed. Before anything is
timed, what is drawn is compared with float32's. Nothing else may run on the machine.

    python benchmarks/speed.py images              # an image end to end, in batches of 1, 4 and 16
    python benchmarks/speed.py unet --size sd15    # a forward pass
    python benchmarks/speed.py training            # a step of the UNet and of the VAE
    python benchmarks/speed.py caching             # images to latents
    python benchmarks/speed.py startup             # from the command line to the file
    python benchmarks/speed.py all --compare benchmarks/speed.json    # what moved since: make bench
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from speed_drawing import images_tables, startup_table, unet_table
from speed_tables import Table, gate, measure, show
from speed_training import caching_table, unet_step_table, vae_step_table
from timing import machine, measure_ceiling, peak_memory

TABLES = ("images", "unet", "training", "caching", "startup")
MOVED = 0.05
"""Of a ratio, and beyond both intervals: less is noise."""

Ratios = dict[str, dict[str, tuple[float, float, float]]]


def main() -> None:
    arguments = parse()
    # Graphs that torch finds on disk may have been compiled for another number of threads.
    cache = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    torch.set_grad_enabled(False)
    device = torch.device(arguments.device)
    ceiling = measure_ceiling(device)
    found: dict[str, Any] = {"machine": machine(device), "date": time.strftime("%Y-%m-%d")}
    print(f"{found['machine']}, {found['date']}; {ceiling}", flush=True)
    found["ratios"] = ratios = {}
    failed = []
    for table in tables(arguments, device):
        rows = measure(table, rounds=arguments.rounds, device=device)
        show(table, rows, ceiling)
        failed += gate(table, rows)
        ratios[table.name] = {name: row.ratio for name, row in rows.items()}
        if arguments.out is not None:  # after each table: the next ones take minutes
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"peak memory of all in this process: {peak_memory(device) / 2**30:.2f} GiB")
    if arguments.compare is not None and not arguments.compare.exists():
        print(f"{arguments.compare} is not there to compare with; --out writes it")
    elif arguments.compare is not None:
        print(moved(ratios, json.loads(arguments.compare.read_text())))
    if failed:
        sys.exit("\n".join(failed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--model", default="emoji", help="of images and startup; a folder or emoji")
    parser.add_argument("--size", default="emoji", help="of unet: emoji, a folder, or sd15")
    parser.add_argument("--steps", type=int, default=20, help="of an image")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="of images")
    parser.add_argument("--batch_size", type=int, default=64, help="of a training step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compare", type=Path, help="the ratios of another run, as --out wrote")
    parser.add_argument("--out", type=Path, help="JSON of the ratios")
    return parser.parse_args()


def tables(arguments: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """The tables that were asked for, each made when the one before is done."""
    wanted = TABLES if arguments.table == "all" else (arguments.table,)
    if "images" in wanted:
        size = {"steps": arguments.steps, "batches": arguments.batches}
        yield from images_tables(arguments.model, **size, device=device)
    if "unet" in wanted:
        yield unet_table(arguments.size, batch=1, device=device)
    if "training" in wanted:
        yield unet_step_table(batch_size=arguments.batch_size, device=device)
        yield vae_step_table(batch_size=arguments.batch_size // 2, device=device)
    if "caching" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            yield caching_table(Path(folder), device=device)
    if "startup" in wanted:
        yield startup_table(arguments.model)


def moved(now: Ratios, before: dict[str, Any]) -> str:
    """What a peer's time is beside ours, where that differs from an earlier run."""
    lines = [f"Beside {before['machine']}, {before['date']}:"]
    for table, rows in now.items():
        for name, (middle, low, high) in rows.items():
            earlier = before["ratios"].get(table, {}).get(name)
            if earlier is None:
                continue
            apart = high < earlier[1] or low > earlier[2]
            if apart and abs(middle / earlier[0] - 1) > MOVED:
                word = "better" if middle > earlier[0] else "worse"
                lines.append(f"  {table}: {name} / ours {earlier[0]:.2f} -> {middle:.2f}, {word}")
    if len(lines) == 1:
        lines.append("  nothing moved")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
