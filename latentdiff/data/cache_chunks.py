"""The files of an unfinished latent cache: for each chunk its moments and a record of its samples.

A chunk's moments are written first; its record (names, captions, bad samples) is written last and
atomically, so that a chunk with a record is finished. When all chunks are finished, the records are
joined into the index and header of a finished cache, see `cache.py`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from latentdiff.data.samples import DIGEST
from latentdiff.formats.weights import replacing, save_json

RECORD = pa.schema(
    {
        "name": pa.string(),
        "captions": pa.list_(pa.string()),
        "counts": pa.list_(pa.int32()),  # how often each caption comes, see `captions.counted`
        "digest": pa.binary(DIGEST),  # of the image file, see `samples.digest`
        "bucket": pa.int32(),
        "row": pa.int32(),
        "reason": pa.string(),  # a bad sample has this and `detail`, and nothing else
        "detail": pa.string(),
    }
)
SAMPLES_FILE = "samples.arrow"
SAMPLES = pa.schema([RECORD.field(name) for name in ("name", "captions", "counts", "digest")])


class MomentsFile:
    """A .npy file of float16 to which rows are appended; their number need not be known before."""

    def __init__(self, file: IO[bytes], shape: tuple[int, ...]) -> None:
        self.file, self.shape, self.count = file, shape, 0
        self._write_header()
        self._start = file.tell()

    def add(self, rows: np.ndarray) -> None:
        """Append rows (n, *shape)."""
        assert rows.shape[1:] == self.shape
        self.file.write(rows.astype("<f2").tobytes())
        self.count += len(rows)

    def finish(self) -> None:
        """Write the number of rows into the header, in which NumPy leaves room for it."""
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self._start

    def _write_header(self) -> None:
        header = {"descr": "<f2", "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)


def record_path(folder: Path, number: int) -> Path:
    """Return the path of a chunk's record."""
    return folder / f"chunk-{number:05d}.arrow"


def records(folder: Path) -> list[Path]:
    """List the paths of the records of all finished chunks, in order."""
    return sorted(folder.glob("chunk-*.arrow"), key=lambda path: int(path.stem.split("-")[1]))


def read_record(path: Path) -> pa.Table:
    """Read the samples of a finished chunk."""
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def write_record(
    path: Path, samples: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any]
) -> None:
    """Write the record that finishes a chunk; `inputs` identify the VAE and data of its cache."""
    schema = RECORD.with_metadata({"made_of": json.dumps(inputs)})
    with replacing(path) as temporary, pa.ipc.new_stream(str(temporary), schema) as writer:
        writer.write_table(pa.Table.from_pylist(samples, schema))


def record_inputs(path: Path) -> dict[str, Any]:
    """Read the `inputs` of a finished chunk's cache from its record."""
    return json.loads(read_record(path).schema.metadata[b"made_of"])


def join_records(folder: Path, header: dict[str, Any]) -> None:
    """Join the records of all chunks into a cache's index, samples and header, and delete them."""
    paths = records(folder)
    assert paths == [record_path(folder, number) for number in range(len(paths))]
    index = list[np.ndarray]()
    bad = list[dict[str, str]]()
    with (
        replacing(folder / SAMPLES_FILE) as temporary,
        pa.ipc.new_stream(str(temporary), SAMPLES) as writer,
    ):
        for number, path in enumerate(paths):
            record = read_record(path)
            good = record.filter(record["bucket"].is_valid())
            rows = np.full((len(good), 3), number, dtype=np.int32)
            rows[:, 0], rows[:, 2] = good["bucket"].to_numpy(), good["row"].to_numpy()
            index.append(rows)
            writer.write_table(good.select(SAMPLES.names))
            wrong = record.filter(record["reason"].is_valid())
            bad += wrong.select(["reason", "detail"]).to_pylist()
    with replacing(folder / "index.npy") as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(index))
    finish(folder, {**header, "num_samples": sum(map(len, index))}, bad)
    for path in paths:
        path.unlink()


def finish(folder: Path, header: Mapping[str, Any], bad: Sequence[Mapping[str, str]]) -> None:
    """Write the list of bad samples and, last, the header, with the digest of the samples."""
    left_out = folder / "left_out.jsonl"
    if bad:
        with replacing(left_out) as temporary:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in bad]
            temporary.write_text("".join(lines), encoding="utf-8")
    else:
        left_out.unlink(missing_ok=True)
    with (folder / SAMPLES_FILE).open("rb") as file:
        samples = hashlib.file_digest(file, "sha256").hexdigest()
    save_json({**header, "samples": samples}, folder / "header.json")
