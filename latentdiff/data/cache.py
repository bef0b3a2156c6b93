"""LatentCache: the posterior moments of every picture, encoded once and memory-mapped afterwards.

A cache folder holds `moments.npy` (N, 2C, H, W) in float16, `captions.jsonl` (a JSON list a line)
and `header.json`, which is written last and names the VAE and the data that it was made from.
Moments keep the VAE's randomness: each visit draws a new latent (LDM, section 3.1).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from latentdiff.data.images import CaptionedImages, DataConfig
from latentdiff.formats.weights import load_json, save_json
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.vae import VAE
from latentdiff.pictures import to_floats


class LatentCache(Dataset[dict[str, Any]]):
    """Examples `{"moments": (2C, H, W) float32, "captions": [str, …]}` from a finished cache."""

    def __init__(self, folder: Path, *, vae: VAE) -> None:
        """Open a cache and make sure that `vae` is the one that it was made with.

        Raises ValueError when the folder holds no finished cache, or one of another VAE.
        """
        if not (folder / "header.json").is_file():
            raise ValueError(
                f"{folder} holds no finished latent cache (header.json is missing); "
                "make one with train/cache_latents.py"
            )
        self.header = load_json(folder / "header.json")
        if self.header["vae"] != fingerprint(vae, vae.config.to_dict()):
            raise ValueError(
                f"{folder} was encoded by another VAE than the one given; encode it anew"
            )
        self.moments = np.load(folder / "moments.npy", mmap_mode="r")
        with (folder / "captions.jsonl").open(encoding="utf-8") as file:
            self.captions: list[list[str]] = [json.loads(line) for line in file]
        assert len(self.captions) == len(self.moments)

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        moments = torch.from_numpy(self.moments[index].astype(np.float32))
        return {"moments": moments, "captions": self.captions[index]}


def collate_moments(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `{"moments": (B, 2C, H, W) float32, "captions": [[str, …], …]}`."""
    return {
        "moments": torch.stack([example["moments"] for example in examples]),
        "captions": [example["captions"] for example in examples],
    }


@torch.no_grad()
def write_cache(
    folder: Path,
    dataset: CaptionedImages,
    vae: VAE,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Encode the data set into `folder`, each process its share; `wait` is a barrier for them all.

    A finished cache of the same VAE and data is kept. Raises ValueError when the folder holds
    the cache of another VAE or other data, and for data without captions.
    """
    if not dataset.captions:
        raise ValueError("caption_columns is empty: latents are for training on captions")
    header = {"vae": fingerprint(vae, vae.config.to_dict()), "data": data_fingerprint(dataset)}
    if (folder / "header.json").is_file():
        found = load_json(folder / "header.json")
        changed = [name for name in header if found[name] != header[name]]
        if changed:
            raise ValueError(
                f"{folder} holds the cache of another {' and other '.join(changed)}; "
                "choose a new folder or delete this one"
            )
        return
    f, C = vae.config.factor, vae.config.latent_channels
    side = dataset.config.image_size // f
    path = folder / "moments.npy"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shape = (len(dataset), 2 * C, side, side)
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
        lines = [json.dumps(texts, ensure_ascii=False) + "\n" for texts in dataset.captions]
        (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    wait()
    moments = np.lib.format.open_memmap(path, "r+")
    device = next(vae.parameters()).device
    starts = range(0, len(dataset), batch_size)[rank::world_size]
    for start in tqdm(starts, desc="encoding", unit="batch", disable=rank > 0):
        ids = range(start, min(start + batch_size, len(dataset)))
        images = to_floats(torch.stack([dataset.image(i) for i in ids]).to(device))
        posterior = vae.encode(images)
        both = torch.cat([posterior.mean, posterior.logvar], dim=1)
        moments[ids.start : ids.stop] = both.float().cpu().numpy().astype(np.float16)
    moments.flush()
    wait()
    if rank == 0:
        save_json({**header, "num_samples": len(dataset)}, folder / "header.json")
    wait()


def data_fingerprint(dataset: CaptionedImages) -> str:
    """SHA-256 of which pictures, how they are cut, and all captions."""
    config: DataConfig = dataset.config
    names = {field: getattr(config, field) for field in ("data", "split", "image_size")}
    digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode())
    digest.update(str(dataset.rows._fingerprint).encode())
    for texts in dataset.captions:
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()
