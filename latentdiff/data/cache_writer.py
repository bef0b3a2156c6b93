"""Encodes a data set into a latent cache: by several processes, and on from where one was killed.

The data is cut into chunks of consecutive samples, and a chunk is one process's. Its moments are
written first, its record (names, captions, what was bad) last and in one piece, so a chunk with a
record is finished. When all are, the first process joins the records into index and header.
What is written does not depend on the number of processes, nor on how often they were killed.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.data.bad_samples import breakdown
from latentdiff.data.buckets import Size, check_scale, nearest
from latentdiff.data.cache import FORMAT, moments_path, read_header
from latentdiff.data.config import DataConfig
from latentdiff.data.decode import BadSample
from latentdiff.data.opening import ImageDataset
from latentdiff.data.prefetch import prefetch
from latentdiff.data.samples import Sample
from latentdiff.data.views import Views
from latentdiff.formats.weights import replacing, save_json
from latentdiff.images import to_floats
from latentdiff.models.fingerprint import encoder_fingerprint
from latentdiff.models.vae import VAE

CHUNK = 256  # samples of a file, which a killed process has to encode again
RECORD = pa.schema(
    {
        "name": pa.string(),
        "captions": pa.list_(pa.string()),
        "bucket": pa.int32(),
        "row": pa.int32(),
        "reason": pa.string(),  # of a bad sample, which has this and `detail` alone
        "detail": pa.string(),
    }
)


def write_cache(
    folder: Path,
    dataset: ImageDataset,
    vae: VAE,
    *,
    batch_size: int,
    views: Views | None = None,
    chunk_size: int = CHUNK,
    rank: int = 0,
    world_size: int = 1,
    together: Callable[[Callable[[], None]], None] = lambda act: act(),
    gate: Callable[[], None] = lambda: None,
) -> None:
    """Encode the data set into `folder`, each process its chunks.

    `together(act)` calls `act`, and comes back when all processes have done so, or raises in all
    of them when it failed in one. `gate` is called by the first of them before anything is written,
    unless the cache is finished, and may raise ValueError: see `gate.check_latents`.

    A finished cache of the same VAE, data, views and buckets is kept, and so are finished chunks.
    `batch_size` images are encoded at a time, and threads (`num_workers` of the data) decode
    ahead. Bad samples are left out and counted. Raises ValueError when the folder holds the cache
    of something else, when another process writes it, when the sizes do not suit the VAE, when more
    than `max_bad` is bad, and for data without captions.
    """
    config = dataset.config
    if not config.caption_columns:
        raise ValueError("caption_columns is empty: latents are for training on captions")
    for size in config.buckets():
        if size[0] % vae.config.factor or size[1] % vae.config.factor:
            field = "bucket_step" if config.bucket_step else "image_size"
            raise ValueError(
                f"{field}={getattr(config, field)} must be divisible by {vae.config.factor}, "
                "the factor of the VAE"
            )
    views = Views() if views is None else views
    made_of = {
        "format": FORMAT,
        "vae": encoder_fingerprint(vae),
        "data": dataset.fingerprint,
        "views": asdict(views),
        "buckets": [list(size) for size in config.buckets()],
        "chunk_size": chunk_size,
    }
    if (folder / "header.json").is_file():
        _compare(folder, made_of, read_header(folder))
        return
    records = _records(folder)
    if records:
        _compare(folder, made_of, _made_of(records[0]))
    encoder = _Encoder(folder, config, vae, views, batch_size, made_of)
    with ExitStack() as stack:

        def begin() -> None:
            if rank == 0:
                gate()
                stack.enter_context(_alone(folder))

        together(begin)
        together(lambda: encoder.run(dataset, rank, world_size))
        together(lambda: _finish(folder, config, made_of) if rank == 0 else None)


def _finish(folder: Path, config: DataConfig, made_of: dict[str, Any]) -> None:
    """Count what was left out and, if it is not too much, join the records."""
    left_out, total = Counter[str](), 0
    for path in _records(folder):
        record = _read(path)
        left_out.update(record["reason"].drop_null().to_pylist())
        total += len(record)
    _check_left_out(left_out, total, config)
    _join(folder, {**made_of, "left_out": dict(left_out)})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder, and sweep what killed processes left. Raises ValueError if it is held."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for left in folder.glob(".*.tmp"):
                left.unlink()
            yield
    except Timeout as error:
        raise ValueError(f"{folder} is being written by another process") from error


@dataclass
class _Encoder:
    """One process's work on a cache."""

    folder: Path
    config: DataConfig
    vae: VAE
    views: Views
    batch_size: int
    made_of: dict[str, Any]

    def run(self, dataset: ImageDataset, rank: int, world_size: int) -> None:
        """Encode the chunks that are this process's and not finished yet."""
        known = dataset.num_samples
        size = self.made_of["chunk_size"]
        share = known and sum(
            min(size, known - i) for i in range(rank * size, known, world_size * size)
        )
        bad = Counter[str]()
        with tqdm(total=share, desc="encoding", unit="image", disable=rank > 0) as progress:

            def wanted(number: int) -> bool:
                if number % world_size != rank:
                    return False
                finished = self._finished(number)
                progress.update(finished)
                return finished == 0

            for number, samples in dataset.chunks(self.made_of["chunk_size"], wanted):
                bad.update(self._chunk(number, samples, progress))
                if known is not None:  # no need to go on to the end
                    _check_left_out(bad, known, self.config)

    def _finished(self, number: int) -> int:
        """How many samples a finished chunk has; 0 if it has to be encoded."""
        path = _record_path(self.folder, number)
        if not path.is_file():
            return 0
        record = _read(path)
        rows = Counter(record["bucket"].drop_null().to_pylist())
        for bucket, count in rows.items():
            size = self.config.buckets()[bucket]
            try:
                found = np.load(moments_path(self.folder, number, size), mmap_mode="r").shape
            except (OSError, ValueError):
                return 0
            if found != (count, *self._shape(size)):
                return 0
        return len(record)

    def _shape(self, size: Size) -> tuple[int, int, int, int]:
        """(V, 2C, h, w): the moments of one image."""
        f, C = self.vae.config.factor, self.vae.config.latent_channels
        return self.views.count, 2 * C, size[1] // f, size[0] // f

    def _chunk(
        self, number: int, samples: Iterable[Sample | BadSample], progress: Any
    ) -> list[str]:
        """Encode and write a chunk; the reasons of its bad samples."""
        buckets = self.config.buckets()
        group = max(1, self.batch_size // self.views.count)
        record: list[dict[str, Any]] = []
        with ExitStack() as stack:
            files: dict[int, _Rows] = {}
            waiting: dict[int, list[Tensor]] = {}
            for found in prefetch(self._look, samples, threads=self.config.num_workers):
                progress.update()
                if isinstance(found, BadSample):
                    record.append({"reason": found.reason, "detail": found.detail})
                    continue
                name, captions, bucket, pixels = found
                if bucket not in files:
                    path = moments_path(self.folder, number, buckets[bucket])
                    file = stack.enter_context(stack.enter_context(replacing(path)).open("w+b"))
                    files[bucket] = _Rows(file, self._shape(buckets[bucket]))
                    waiting[bucket] = []
                row = files[bucket].count + len(waiting[bucket])
                record.append({"name": name, "captions": captions, "bucket": bucket, "row": row})
                waiting[bucket].append(pixels)
                if len(waiting[bucket]) == group:
                    files[bucket].add(self._encode(waiting[bucket]))
                    waiting[bucket] = []
            for bucket, pixels in waiting.items():
                if pixels:
                    files[bucket].add(self._encode(pixels))
            for file in files.values():
                file.finish()
        with replacing(_record_path(self.folder, number)) as temporary:
            schema = RECORD.with_metadata({"made_of": json.dumps(self.made_of)})
            with pa.ipc.new_stream(str(temporary), schema) as writer:
                writer.write_table(pa.Table.from_pylist(record, schema))
        return [row["reason"] for row in record if "reason" in row]

    def _look(self, sample: Sample | BadSample) -> BadSample | tuple[str, list[str], int, Tensor]:
        """Name, captions, bucket and views (V, 3, H, W), without the large image; or a fault."""
        if isinstance(sample, BadSample):
            return sample
        size = sample.image.size
        bucket = nearest(size, self.config.buckets())
        wanted = self.config.buckets()[bucket]
        try:
            check_scale(size, wanted, self.config.upscale_limit)
        except BadSample as error:
            return BadSample(error.reason, f"{sample.name!r} {error.detail}")
        views = self.views.of(sample.image, sample.name, wanted)
        return sample.name, sample.captions, bucket, views

    @torch.no_grad()
    def _encode(self, pixels: list[Tensor]) -> np.ndarray:
        """Views of n images, (V, 3, H, W) each -> moments (n, V, 2C, h, w)."""
        device = next(self.vae.parameters()).device
        posterior = self.vae.encode(to_floats(torch.cat(pixels).to(device)))
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1).half().cpu()
        if not moments.isfinite().all():
            raise ValueError("the VAE makes latents that are not finite, or too large for float16")
        return moments.unflatten(0, (len(pixels), -1)).numpy()


class _Rows:
    """A .npy file of float16 that grows row by row; how many there will be need not be known."""

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
        """Say in the header how many rows there are, for which NumPy leaves room in it."""
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self._start

    def _write_header(self) -> None:
        header = {"descr": "<f2", "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _join(folder: Path, header: dict[str, Any]) -> None:
    """Make index, samples and header of the records, which are then no longer needed."""
    records = _records(folder)
    assert records == [_record_path(folder, number) for number in range(len(records))]
    index = list[np.ndarray]()
    bad = list[dict[str, str]]()
    schema = pa.schema([RECORD.field("name"), RECORD.field("captions")])
    with (
        replacing(folder / "samples.arrow") as temporary,
        pa.ipc.new_stream(str(temporary), schema) as writer,
    ):
        for number, path in enumerate(records):
            record = _read(path)
            good = record.filter(record["bucket"].is_valid())
            rows = np.full((len(good), 3), number, dtype=np.int32)
            rows[:, 0], rows[:, 2] = good["bucket"].to_numpy(), good["row"].to_numpy()
            index.append(rows)
            writer.write_table(good.select(schema.names))
            wrong = record.filter(record["reason"].is_valid())
            bad += wrong.select(["reason", "detail"]).to_pylist()
    with replacing(folder / "index.npy") as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(index))
    if bad:
        with replacing(folder / "left_out.jsonl") as temporary:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in bad]
            temporary.write_text("".join(lines), encoding="utf-8")
    count = sum(map(len, index))
    save_json({**header, "num_samples": count}, folder / "header.json")
    for path in records:
        path.unlink()


def _check_left_out(left_out: Counter[str], total: int, config: DataConfig) -> None:
    """Raise ValueError when too many of `total` samples are bad, or none is good."""
    bad = left_out.total()
    if bad == total and config.max_bad == 1:
        raise ValueError(f"data={config.data!r}: no image is left of {total}")
    if bad > config.max_bad * total:
        raise ValueError(
            f"data={config.data!r}: {bad} of {total} samples cannot be encoded, more than "
            f"max_bad={config.max_bad}: {breakdown(left_out)}; `latentdiff data check` finds them"
        )


def _compare(folder: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError when a cache is of something else than what is wanted."""
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        raise ValueError(
            f"{folder} holds the cache of another {' and other '.join(changed)}; "
            "choose a new folder or delete this one"
        )


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05d}.arrow"


def _records(folder: Path) -> list[Path]:
    return sorted(folder.glob("chunk-*.arrow"), key=lambda path: int(path.stem.split("-")[1]))


def _read(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def _made_of(record: Path) -> dict[str, Any]:
    return json.loads(_read(record).schema.metadata[b"made_of"])
