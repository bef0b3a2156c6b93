"""Encodes a data set into a latent cache, in several processes; a killed run can be resumed.

The data is split into chunks of consecutive samples. Each chunk is encoded by one process, and a
finished chunk is never encoded again. When all are finished, the main process joins them. The files
depend neither on the number of processes nor on interruptions.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.data.bad_samples import advice, breakdown
from latentdiff.data.buckets import Size, check_scale, nearest
from latentdiff.data.cache import FORMAT, moments_path, read_cache_header
from latentdiff.data.cache_captions import check_same, noted_options, renew_captions
from latentdiff.data.cache_chunks import (
    MomentsFile,
    finish,
    join_records,
    read_record,
    record_inputs,
    record_path,
    records,
    write_record,
)
from latentdiff.data.captions import counted
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.decode import BadSample
from latentdiff.data.opening import ImageDataset
from latentdiff.data.prefetch import prefetch
from latentdiff.data.samples import EncodedSample, Sample, decoded
from latentdiff.formats.weights import replacing
from latentdiff.images import to_floats
from latentdiff.models.fingerprint import encoder_fingerprint
from latentdiff.models.inpainting import latent_masks, masked_images
from latentdiff.models.vae import VAE

CHUNK = 256  # samples in a chunk; a killed process has to encode its unfinished chunk again
Views = tuple[Tensor, Tensor | None]
"""An image's crops and flips, (…, 3, H, W) uint8, and for inpainting the masks of its variants."""


def write_cache(
    folder: Path,
    dataset: ImageDataset,
    vae: VAE,
    *,
    batch_size: int,
    crop_flip: CropFlip | None = None,
    chunk_size: int = CHUNK,
    rank: int = 0,
    world_size: int = 1,
    on_all: Callable[[Callable[[], None]], None] = lambda act: act(),
    check: Callable[[], None] = lambda: None,
) -> str:
    """Encode the data set into `folder`; each process encodes its own chunks.

    `on_all(act)` calls `act` in every process and returns when all have finished, or raises in all
    of them when it failed in one. The main process calls `check` before it writes anything,
    unless the cache is finished; `check` may raise ValueError, see `check_latents`.

    A finished cache of the same VAE, images, crops, flips and buckets is kept, and so are finished
    chunks. Its captions are read anew if the data has changed; what has come of that is returned,
    in words, in the main process. `batch_size` images are encoded at a time, while threads (the
    data's `num_workers`) decode the next images. Bad samples are left out and counted. Raises
    ValueError when the folder holds a cache of another VAE or other images, when another process
    is writing to it, when the buckets' sizes do not suit the VAE, when the fraction of bad samples
    exceeds `max_bad`, and for data without captions.
    """
    config = dataset.config
    _check_config(config, vae)
    crop_flip = CropFlip() if crop_flip is None else crop_flip
    inputs = {
        "format": FORMAT,
        "vae": encoder_fingerprint(vae),
        "data": dataset.fingerprint,
        "options": noted_options(config),
        "views": crop_flip.to_dict(),
        "buckets": [list(size) for size in config.buckets()],
        "chunk_size": chunk_size,
    }
    encoder = _Encoder(folder, config, vae, crop_flip, batch_size, inputs)
    if (folder / "header.json").is_file():
        return _keep(encoder, dataset, rank=rank, on_all=on_all)
    if finished := records(folder):
        check_same(folder, record_inputs(finished[0]), inputs, finished=False)
    with ExitStack() as stack:

        def begin() -> None:
            if rank == 0:
                check()
                stack.enter_context(_locked(folder))

        on_all(begin)
        on_all(lambda: encoder.run(dataset, rank, world_size))
        on_all(lambda: _finish(folder, config, inputs) if rank == 0 else None)
    return ""


def _keep(
    encoder: "_Encoder",
    dataset: ImageDataset,
    *,
    rank: int,
    on_all: Callable[[Callable[[], None]], None],
) -> str:
    """Keep a finished cache, with captions that are read anew if its data has changed."""
    header = read_cache_header(encoder.folder)
    check_same(encoder.folder, header, encoder.inputs, finished=True)
    if header["data"] == encoder.inputs["data"]:
        return ""
    said = ""

    def renew() -> None:
        nonlocal said
        if rank == 0:
            with _locked(encoder.folder):
                said = encoder.renew(dataset, header["num_samples"])

    on_all(lambda: None)  # nobody writes before all have read the header
    on_all(renew)
    return said


def _check_config(config: DataConfig, vae: VAE) -> None:
    """Raise ValueError for data without captions, and for sizes that the VAE cannot encode."""
    if not config.caption_rules():
        raise ValueError("caption_columns is empty: latents are for training on captions")
    for width, height in config.buckets():
        if width % vae.config.factor or height % vae.config.factor:
            field = "bucket_step" if config.bucket_step else "image_size"
            raise ValueError(
                f"{field}={getattr(config, field)} must be divisible by {vae.config.factor}, "
                "the factor of the VAE"
            )


def _finish(folder: Path, config: DataConfig, inputs: dict[str, Any]) -> None:
    """Join the chunks' records; raise ValueError when too many samples are bad."""
    left_out, total = Counter[str](), 0
    for path in records(folder):
        record = read_record(path)
        left_out.update(record["reason"].drop_null().to_pylist())
        total += len(record)
    _check_left_out(left_out, total, config)
    join_records(folder, {**inputs, "left_out": dict(left_out)})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder and delete what killed processes left; ValueError if it is locked already."""
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
    """Encodes and writes one process's chunks of a cache."""

    folder: Path
    config: DataConfig
    vae: VAE
    crop_flip: CropFlip
    batch_size: int
    inputs: dict[str, Any]

    def renew(self, dataset: ImageDataset, num_samples: int) -> str:
        """Read the captions of the finished cache anew; returns how many have changed, in words."""

        def why_bad(sample: EncodedSample) -> BadSample | None:
            prepared = self._fit(decoded(sample, self.config))
            return prepared if isinstance(prepared, BadSample) else None

        changed, bad = renew_captions(self.folder, dataset.samples(), why_bad)
        left_out = Counter(sample.reason for sample in bad)
        _check_left_out(left_out, num_samples + len(bad), self.config)
        header = {**self.inputs, "num_samples": num_samples, "left_out": dict(left_out)}
        rows = [{"reason": sample.reason, "detail": sample.detail} for sample in bad]
        finish(self.folder, header, rows)
        return f"the captions of {changed} of {num_samples} images have changed, no image has"

    def run(self, dataset: ImageDataset, rank: int, world_size: int) -> None:
        """Encode those of this process's chunks that are not finished."""
        known = dataset.num_samples
        size = self.inputs["chunk_size"]
        total = known and sum(
            min(size, known - i) for i in range(rank * size, known, world_size * size)
        )
        bad = Counter[str]()
        with tqdm(total=total, desc="encoding", unit="image", disable=rank > 0) as progress:

            def wanted(number: int) -> bool:
                if number % world_size != rank:
                    return False
                finished = self._finished(number)
                progress.update(finished)
                return finished == 0

            for number, samples in dataset.chunks(size, wanted):
                bad.update(self._chunk(number, samples, progress))
                if known is not None:  # too many bad samples are refused before the end
                    _check_left_out(bad, known, self.config)

    def _finished(self, number: int) -> int:
        """Return the number of samples of a finished chunk, 0 for one that has to be encoded."""
        path = record_path(self.folder, number)
        if not path.is_file():
            return 0
        record = read_record(path)
        rows = Counter(record["bucket"].drop_null().to_pylist())
        for bucket, count in rows.items():
            size = self.config.buckets()[bucket]
            try:
                shape = np.load(moments_path(self.folder, number, size), mmap_mode="r").shape
            except (OSError, ValueError):
                return 0
            if shape != (count, *self._shape(size)):
                return 0
        return len(record)

    def _shape(self, size: Size) -> tuple[int, int, int, int]:
        """Return the shape of one image's moments, (V, 2C or 4C + 1, h, w)."""
        f, C = self.vae.config.factor, self.vae.config.latent_channels
        channels = 4 * C + 1 if self.crop_flip.masks else 2 * C
        return self.crop_flip.num_variants, channels, size[1] // f, size[0] // f

    def _chunk(
        self, number: int, samples: Iterable[Sample | BadSample], progress: Any
    ) -> list[str]:
        """Encode and write a chunk; return the reasons of its bad samples."""
        buckets = self.config.buckets()
        group = max(1, self.batch_size // self.crop_flip.num_variants)
        record: list[dict[str, Any]] = []
        with ExitStack() as stack:
            files: dict[int, MomentsFile] = {}
            waiting: dict[int, list[Views]] = {}
            for prepared in prefetch(self._fit, samples, threads=self.config.num_workers):
                progress.update()
                if isinstance(prepared, BadSample):
                    record.append({"reason": prepared.reason, "detail": prepared.detail})
                    continue
                name, captions, file_digest, bucket, views = prepared
                if bucket not in files:
                    path = moments_path(self.folder, number, buckets[bucket])
                    file = stack.enter_context(stack.enter_context(replacing(path)).open("w+b"))
                    files[bucket] = MomentsFile(file, self._shape(buckets[bucket]))
                    waiting[bucket] = []
                row = files[bucket].count + len(waiting[bucket])
                texts, counts = counted(captions)
                record.append({"name": name, "captions": texts, "counts": counts})
                record[-1] |= {"digest": file_digest, "bucket": bucket, "row": row}
                waiting[bucket].append(views)
                if len(waiting[bucket]) == group:
                    files[bucket].add(self._encode(waiting[bucket]))
                    waiting[bucket] = []
            for bucket, rest in waiting.items():
                if rest:
                    files[bucket].add(self._encode(rest))
            for file in files.values():
                file.finish()
        write_record(record_path(self.folder, number), record, self.inputs)
        return [row["reason"] for row in record if "reason" in row]

    def _fit(
        self, sample: Sample | BadSample
    ) -> BadSample | tuple[str, list[str], bytes, int, Views]:
        """Return a sample's name, captions, digest, bucket and views, or why it is bad."""
        if isinstance(sample, BadSample):
            return sample
        size = sample.image.size
        bucket = nearest(size, self.config.buckets())
        wanted = self.config.buckets()[bucket]
        try:
            check_scale(size, wanted, self.config.upscale_limit)
        except BadSample as error:
            return BadSample(error.reason, f"{sample.name!r} {error.detail}")
        pixels = self.crop_flip.views(sample.image, sample.name, wanted)
        masks = self.crop_flip.random_masks(sample.name, wanted) if self.crop_flip.masks else None
        return sample.name, sample.captions, sample.digest, bucket, (pixels, masks)

    @torch.no_grad()
    def _encode(self, views: list[Views]) -> np.ndarray:
        """Encode the views of n images to moments (n, V, 2C or 4C + 1, h, w)."""
        device = next(self.vae.parameters()).device
        images = to_floats(torch.cat([pixels for pixels, _ in views]).to(device))
        moments = self._moments(images)
        if self.crop_flip.masks:
            masks = torch.cat([masks for _, masks in views if masks is not None]).to(device)
            images, moments = (
                x.repeat_interleave(self.crop_flip.masks, 0) for x in (images, moments)
            )
            masked = self._moments(masked_images(images, masks))
            moments = torch.cat([moments, latent_masks(masks, masked), masked], dim=1)
        moments = moments.half().cpu()
        if not moments.isfinite().all():
            raise ValueError("the VAE makes latents that are not finite, or too large for float16")
        return moments.unflatten(0, (len(views), -1)).numpy()

    def _moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the latents of images in [-1, 1], (B, 2C, h, w)."""
        posterior = self.vae.encode(images)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)


def _check_left_out(left_out: Counter[str], total: int, config: DataConfig) -> None:
    """Raise ValueError when too many of `total` samples are bad, or none is good."""
    bad = left_out.total()
    if bad == total and config.max_bad == 1:
        raise ValueError(f"data={config.data!r}: no image is left of {total}")
    if bad / max(1, total) > config.max_bad:
        raise ValueError(
            f"data={config.data!r}: {bad} of {total} samples cannot be encoded, more than "
            f"max_bad={config.max_bad}: {breakdown(left_out)}; `latentdiff data check` finds them: "
            f"{advice(bad, total)}"
        )
