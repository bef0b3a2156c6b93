"""LatentCache: the posterior moments of every image, encoded once and then read one by one.

Training samples a new latent from the moments each time (LDM, section 3.1).

A cache folder, which `cache_writer.py` writes, holds
- `moments-00012-64x48.npy`: the moments of the m images of chunk 12 of the data that were cropped
  to 64 x 48 pixels, (m, V, 2C, h, w) in float16 for V variants (crops and flips); where these
  are masked for inpainting, (m, V, 4C + 1, h, w): the mask and the moments of the masked image
  follow, see `split_masked`;
- `index.npy`: the bucket, chunk and row of each sample, (N, 3) int32;
- `samples.arrow`: the name of each sample, its captions, how often each of them comes, and the
  digest of its image file;
- `left_out.jsonl`: the bad samples, if there are any;
- `header.json`: fingerprints of the VAE and the data, the options of the data, the sizes of the
  buckets, the number of samples and the digest of `samples.arrow`; it is written last.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.table import MemoryMappedTable
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.data.buckets import Size
from latentdiff.data.captions import CaptionRules, Captions
from latentdiff.data.crop_flip import CropFlip
from latentdiff.formats.weights import load_json
from latentdiff.models.fingerprint import encoder_fingerprint
from latentdiff.models.vae import VAE

FORMAT = 4  # version of the files and of the cropping; caches of other versions are refused


class LatentCache(Dataset[dict[str, Any]]):
    """Examples `{"moments": (2C, h, w) float32, "captions": [str, …]}` from a finished cache.

    With masks the moments have 4C + 1 channels, see `split_masked`. `cache[i]` is variant 0 of
    example i, and `cache[i, v]` variant v. Moments are read when they are indexed, and worker
    processes open the files anew, whether they are forked or spawned.
    """

    header: dict[str, Any]
    buckets: np.ndarray
    """(N,): the index of each example's size in `sizes`."""
    captions: Captions

    def __init__(self, folder: Path, *, vae: VAE | None = None) -> None:
        """Open a finished cache; with `vae`, check that this VAE made it.

        Raises ValueError when the folder holds no finished cache, or another VAE's.
        """
        self.folder = folder
        self.header = read_cache_header(folder)
        if vae is not None:
            self.check_vae(vae)
        self._open()

    @property
    def sizes(self) -> list[Size]:
        """The sizes (width, height) of the buckets in pixels."""
        return [(width, height) for width, height in self.header["buckets"]]

    @property
    def image_size(self) -> int:
        """The side of the square bucket, in pixels."""
        return next(width for width, height in self.sizes if width == height)

    @property
    def data(self) -> str | None:
        """The data that the cache was made of; None if an older version made it."""
        return self.header.get("options", {}).get("data")

    @property
    def crop_flip(self) -> CropFlip:
        """The variants of each image."""
        return CropFlip(**self.header["views"])

    def mask(self, index: int) -> Tensor:
        """Return the mask of example `index`'s variant 0, (1, height, width), 1 where to paint."""
        name = self._rows[index]["name"]
        return self.crop_flip.random_masks(name, self.sizes[self.buckets[index]])[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the VAE, the crops, the images and the captions, wherever the data lies.

        Caches of older versions know of their images by the data alone.
        """
        header = dict(self.header)
        if "samples" in header:
            del header["data"], header["options"]
        return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()

    def check_vae(self, vae: VAE) -> None:
        """Raise ValueError when another VAE's encoder made the cache; the decoder may differ."""
        if self.header["vae"] != encoder_fingerprint(vae):
            raise ValueError(
                f"{self.folder} was encoded by another VAE than the one given; encode it anew"
            )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        number, variant = index if isinstance(index, tuple) else (index, 0)
        bucket, chunk, row = self._index[number].tolist()
        moments = torch.from_numpy(self._moments(chunk, bucket, row, variant).astype(np.float32))
        return {"moments": moments, "captions": self.captions[number]}

    def bucket_moments(self, bucket: int) -> np.ndarray:
        """Read all moments of a bucket's examples, in order, (n, V, 2C or 4C + 1, h, w) float16.

        Raises ValueError for a file that is missing or damaged.
        """
        members = np.flatnonzero(self.buckets == bucket)
        parts = []
        for chunk in np.unique(self._index[members, 1]).tolist():
            path = moments_path(self.folder, chunk, self.sizes[bucket])
            rows = self._index[members[self._index[members, 1] == chunk], 2]
            try:
                parts.append(np.load(path)[rows])
            except (OSError, ValueError, IndexError) as error:
                raise _damaged(path, error) from error
        return np.concatenate(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "header": self.header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.header = state["folder"], state["header"]
        self._open()

    def _open(self) -> None:
        self._index = np.load(self.folder / "index.npy", mmap_mode="r")
        self.buckets = self._index[:, 0]
        table = MemoryMappedTable.from_file(str(self.folder / "samples.arrow"))
        self._rows = datasets.Dataset(table, fingerprint=self.fingerprint)
        self.captions = Captions(
            self._rows,
            CaptionRules(
                columns=("captions",),
                weights={"captions": "counts"},
                counted=True,
                allow_empty=True,
            ),
        )
        assert len(self._index) == len(self.captions) == self.header["num_samples"]
        self._layouts: dict[int, tuple[int, tuple[int, ...]]] = {}
        # Start and end of `moments_path`, since calling that takes longer than reading.
        self._stem = str(self.folder / "moments-")
        self._endings = [f"{width}x{height}.npy" for width, height in self.sizes]

    def _moments(self, chunk: int, bucket: int, row: int, variant: int) -> np.ndarray:
        """Read one variant's moments, float16; the file is opened for them alone.

        Memory maps would not be faster: a large cache has more files than a process may keep open,
        so that nearly every example would map its file anew.
        """
        path = f"{self._stem}{chunk:05d}-{self._endings[bucket]}"
        try:
            with open(path, "rb", buffering=0) as file:
                if bucket not in self._layouts:  # the same in all of a bucket's files
                    np.lib.format.read_magic(file)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                    assert dtype == np.float16
                    self._layouts[bucket] = file.tell(), shape[1:]
                start, (num_variants, *shape) = self._layouts[bucket]
                moments = np.empty(shape, "<f2")
                file.seek(start + moments.nbytes * (row * num_variants + variant))
                if file.readinto(moments.data) != moments.nbytes:
                    raise ValueError("it is cut short")
                return moments
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path | str, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is missing or damaged ({error}); delete the folder and encode it anew"
    )


def split_masked(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the moments of a cache with masks, (…, 4C + 1, h, w), into those of the image,
    (…, 2C, h, w), the mask, (…, 1, h, w), 1 where to paint, and those of the masked image.
    """
    both = moments.shape[-3] - 1
    image, mask, masked = moments.split([both // 2, 1, both // 2], dim=-3)
    return image, mask, masked


def collate_moments(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `{"moments": (B, 2C or 4C + 1, H, W) float32, "captions": [[str, …], …]}`."""
    return {
        "moments": torch.stack([example["moments"] for example in examples]),
        "captions": [example["captions"] for example in examples],
    }


def moments_path(folder: Path, chunk: int, size: Size) -> Path:
    """Return the path of the moments of a chunk's images of one size."""
    return folder / f"moments-{chunk:05d}-{size[0]}x{size[1]}.npy"


def read_cache_header(folder: Path) -> dict[str, Any]:
    """Read the header of a finished cache. Raises ValueError when there is none."""
    if not (folder / "header.json").is_file():
        raise ValueError(
            f"{folder} holds no finished latent cache (header.json is missing); "
            "make one with `accelerate launch -m latentdiff.scripts.cache_latents`"
        )
    header = load_json(folder / "header.json")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was made by another version of latentdiff; delete it and encode it anew"
        )
    return header
