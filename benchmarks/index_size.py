"""Time and memory to open a data set of many rows, the first time and every time after it.

Metadata is made up; all rows name the same hundred pictures, and no picture is decoded. Each
opening is a process of its own: `anonymous` is its own memory, `mapped` are pages of files, which
the system drops when it needs them; MiB at the peak, less what the imports take.

    python benchmarks/index_size.py --rows 1000000 --out DIR
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["jsonl", "parquet"])
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open is not None:
        print(json.dumps(opening(arguments.open)))
        return
    index = arguments.out / "index"
    shutil.rmtree(index, ignore_errors=True)  # the first opening is to be the first
    environment = {**os.environ, "HF_DATASETS_CACHE": str(index)}
    for rows in arguments.rows:
        for kind in arguments.kinds:
            folder = arguments.out / f"{kind}-{rows}"
            make(folder, rows, kind)
            for turn in ("first", "again"):
                command = [sys.executable, __file__, "--out", "unused", "--open", str(folder)]
                done = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                )
                print(f"{kind:8}{rows:>10,} rows, {turn}: {done.stdout.strip()}", flush=True)


def make(folder: Path, rows: int, kind: str) -> None:
    """`metadata.jsonl`, or one parquet file with tiny files as pictures."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    caption = "a picture of number {}, drawn in the evening by somebody who has time for it"
    if kind == "jsonl":
        for i in range(100):
            (folder / f"{i:02}.png").write_bytes(b"")
        with (folder / "metadata.jsonl").open("w") as file:
            for i in range(rows):
                row = {"file_name": f"{i % 100:02}.png", "text": caption.format(i), "source": "x"}
                file.write(json.dumps(row) + "\n")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for start in range(0, rows, 50_000):
        ids = range(start, min(start + 50_000, rows))
        table = pa.table(
            {
                "image": [{"bytes": b"%d" % i, "path": None} for i in ids],
                "text": [caption.format(i) for i in ids],
            },
            schema=pa.schema(
                [
                    ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                    ("text", pa.string()),
                ]
            ),
        )
        if writer is None:
            writer = pq.ParquetWriter(folder / "train.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def opening(folder: Path) -> dict[str, float]:
    """Seconds to open and to read a thousand captions here and there, and peak MiB."""
    import numpy as np

    from latentdiff.data.images import CaptionedImages, DataConfig

    before, peak, stop = memory(), memory(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for name, value in memory().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, processor = time.perf_counter(), time.process_time()
    dataset = CaptionedImages(DataConfig(data=str(folder)))
    opened, busy = time.perf_counter() - start, time.process_time() - processor
    ids = np.random.default_rng(0).integers(0, len(dataset), 1000).tolist()
    start = time.perf_counter()
    for i in ids:
        assert f"number {i}," in dataset.captions[i][0]
    reading = time.perf_counter() - start
    stop.set()
    watcher.join()
    used = {name: round(peak[name] - before[name]) for name in peak}
    return {
        "open_s": round(opened, 2),
        "cpu_s": round(busy, 2),
        "caption_ms": round(reading, 3),
        **used,
    }


def memory() -> dict[str, float]:
    """MiB of this process now (Linux)."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value
    names = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {ours: int(fields[theirs].split()[0]) / 1024 for ours, theirs in names.items()}


if __name__ == "__main__":
    main()
