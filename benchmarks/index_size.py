"""Time and memory to open a data set or latent cache of many rows, the first time and after it.

Metadata is made up; all rows name the same hundred images, and no image is decoded. A cache has
latents of 8 numbers, in ten buckets, so that the measured memory is not theirs. Each
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
import tarfile
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["jsonl", "parquet", "tar", "cache"])
    parser.add_argument("--stream", action="store_true", help="read in order, without an index")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open is not None:
        print(json.dumps(opening(arguments.open, stream=arguments.stream)))
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
                command += ["--stream"] if arguments.stream else []
                done = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                )
                print(f"{kind:8}{rows:>10,} rows, {turn}: {done.stdout.strip()}", flush=True)


def make(folder: Path, rows: int, kind: str) -> None:
    """`metadata.jsonl`, a parquet file or a tar with tiny files as images, or a latent cache."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    caption = "an image of number {}, drawn in the evening by somebody who has time for it"
    if kind == "jsonl":
        for i in range(100):
            (folder / f"{i:02}.png").write_bytes(b"")
        with (folder / "metadata.jsonl").open("w") as file:
            for i in range(rows):
                row = {"file_name": f"{i % 100:02}.png", "text": caption.format(i), "source": "x"}
                file.write(json.dumps(row) + "\n")
        return
    if kind == "cache":
        make_cache(folder, rows, caption)
        return
    if kind == "tar":
        with (folder / "train.tar").open("wb") as file:
            for i in range(rows):
                for name, data in ((f"{i}.png", b"%d" % i), (f"{i}.txt", caption.format(i))):
                    member = tarfile.TarInfo(name)
                    data = data.encode() if isinstance(data, str) else data
                    member.size = len(data)
                    file.write(member.tobuf() + data.ljust(512, b"\0"))
            file.write(bytes(1024))
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


def make_cache(folder: Path, rows: int, caption: str) -> None:
    """What cache_latents.py leaves, with random buckets and latents of a pixel."""
    import numpy as np
    import pyarrow as pa

    from latentdiff.data.buckets import bucket_sizes
    from latentdiff.data.cache import FORMAT, moments_path

    sizes = bucket_sizes(512, 64, 4.0)
    rng = np.random.default_rng(0)
    index = np.zeros((rows, 3), dtype=np.int32)
    index[:, 0], index[:, 1] = rng.integers(0, len(sizes), rows), np.arange(rows) // 1024
    schema = pa.schema(
        [
            ("name", pa.string()),
            ("captions", pa.list_(pa.string())),
            ("counts", pa.list_(pa.int32())),
        ]
    )
    with pa.ipc.new_stream(str(folder / "samples.arrow"), schema) as writer:
        for chunk, start in enumerate(range(0, rows, 1024)):
            ids = range(start, min(start + 1024, rows))
            captions = [[caption.format(i)] for i in ids]
            columns = {"name": [f"{i:08}.png" for i in ids], "captions": captions}
            columns["counts"] = [[1] for _ in ids]
            writer.write_table(pa.table(columns, schema=schema))
            for bucket, size in enumerate(sizes):
                own = start + np.flatnonzero(index[ids.start : ids.stop, 0] == bucket)
                index[own, 2] = np.arange(len(own))
                moments = rng.standard_normal((len(own), 1, 8, 1, 1)).astype(np.float16)
                np.save(moments_path(folder, chunk, size), moments)
    np.save(folder / "index.npy", index)
    views = {"crops": 1, "flip": False}
    header = {"format": FORMAT, "vae": "", "data": "", "views": views, "buckets": sizes}
    header |= {"num_samples": rows, "left_out": {}}
    (folder / "header.json").write_text(json.dumps(header))


def opening(folder: Path, *, stream: bool) -> dict[str, float]:
    """Seconds to open and to read a thousand captions here and there, and peak MiB.

    Of a cache a thousand examples with their latents, and its first and ten thousandth batch; of a
    stream its first thousand captions.
    """
    import numpy as np

    from latentdiff.data.batches import SampleOrder
    from latentdiff.data.cache import LatentCache
    from latentdiff.data.config import DataConfig
    from latentdiff.data.opening import open_images
    from latentdiff.data.stream import StreamedImages

    cached = (folder / "header.json").is_file()

    before, peak, stop = memory(), memory(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for name, value in memory().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, processor = time.perf_counter(), time.process_time()
    if cached:
        dataset = LatentCache(folder)
    else:
        dataset = open_images(DataConfig(data=str(folder), stream=stream))
    opened, busy = time.perf_counter() - start, time.process_time() - processor
    start = time.perf_counter()
    if isinstance(dataset, StreamedImages):
        for i, text in enumerate(dataset.some_captions(1000)):
            assert f"number {i}," in text
    else:
        for i in np.random.default_rng(0).integers(0, len(dataset), 1000).tolist():
            cache = isinstance(dataset, LatentCache)
            texts = dataset[i]["captions"] if cache else dataset.captions[i]
            assert f"number {i}," in texts[0]
    reading = time.perf_counter() - start
    if isinstance(dataset, LatentCache):
        order = SampleOrder(dataset.buckets, batch_size=256, seed=0)
        assert len(order(0)) == len(order(10_000)) == 256
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
