"""The latent cache: what the VAE says, written once, never stale."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import datasets
import numpy as np
import pytest
import torch

from latentdiff.data.cache import LatentCache, collate_moments, write_cache
from latentdiff.data.images import CaptionedImages, DataConfig
from latentdiff.data.shapes import build_shapes
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.vae import VAE, Posterior, VAEConfig
from latentdiff.pictures import to_floats


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    folder = tmp_path_factory.mktemp("pictures")
    build_shapes(folder / "set", count=13, seed=0, size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        columns = ("text", "text_zh")
        data = str(folder / "set")
        return CaptionedImages(DataConfig(data=data, image_size=16, caption_columns=columns))


def vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    config = VAEConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=3,
        sample_size=16,
        scaling_factor=0.7,
    )
    return VAE(config).eval()


def test_the_cache_holds_what_the_vae_encodes(tmp_path: Path, pictures: CaptionedImages) -> None:
    network = vae()
    write_cache(tmp_path / "cache", pictures, network, batch_size=4)
    cache = LatentCache(tmp_path / "cache", vae=network)
    assert len(cache) == len(pictures)
    batch = collate_moments([cache[i] for i in range(len(cache))])
    assert batch["captions"] == pictures.captions
    stored = Posterior.from_moments(batch["moments"])
    images = torch.stack([pictures.image(i) for i in range(len(pictures))])
    with torch.no_grad():
        exact = network.encode(to_floats(images))
    half = torch.finfo(torch.float16)
    for found, expected in ((stored.mean, exact.mean), (stored.logvar, exact.logvar)):
        assert found.dtype == torch.float32
        # Half a unit in the last place; what it adds is float32's, of another batch size.
        torch.testing.assert_close(found, expected, rtol=0.51 * half.eps, atol=half.tiny)


def test_several_processes_write_what_one_writes(tmp_path: Path, pictures: CaptionedImages) -> None:
    network = vae()
    write_cache(tmp_path / "one", pictures, network, batch_size=2)
    barrier = Barrier(3)

    def process(rank: int) -> None:
        write_cache(
            tmp_path / "three",
            pictures,
            network,
            batch_size=2,
            rank=rank,
            world_size=3,
            wait=lambda: void(barrier.wait()),
        )

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(process, range(3)))
    for name in ("moments.npy", "captions.jsonl", "header.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def void(_: object) -> None:
    """Drop a value."""


def test_a_finished_cache_is_kept(tmp_path: Path, pictures: CaptionedImages) -> None:
    write_cache(tmp_path, pictures, vae(), batch_size=8)
    np.lib.format.open_memmap(tmp_path / "moments.npy", "r+")[0] = 5  # would be written over
    write_cache(tmp_path, pictures, vae(), batch_size=8)
    assert (LatentCache(tmp_path, vae=vae())[0]["moments"] == 5).all()


def test_an_unfinished_cache_is_refused_and_written_anew(
    tmp_path: Path, pictures: CaptionedImages
) -> None:
    calls = []

    def wait() -> None:
        calls.append(1)
        if len(calls) == 2:  # all is encoded, the header not yet written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, pictures, vae(), batch_size=8, wait=wait)
    with pytest.raises(ValueError, match=r"no finished latent cache .*train/cache_latents\.py"):
        LatentCache(tmp_path, vae=vae())
    write_cache(tmp_path, pictures, vae(), batch_size=8)
    assert len(LatentCache(tmp_path, vae=vae())) == len(pictures)


def test_the_cache_of_another_vae_is_refused(tmp_path: Path, pictures: CaptionedImages) -> None:
    write_cache(tmp_path, pictures, vae(), batch_size=8)
    with pytest.raises(ValueError, match="another VAE than the one given"):
        LatentCache(tmp_path, vae=vae(seed=1))
    with pytest.raises(ValueError, match="holds the cache of another vae; choose a new folder"):
        write_cache(tmp_path, pictures, vae(seed=1), batch_size=8)


def test_the_cache_of_other_data_is_refused(tmp_path: Path, pictures: CaptionedImages) -> None:
    write_cache(tmp_path, pictures, vae(), batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        others = [
            replace(pictures.config, caption_columns=("text",)),
            replace(pictures.config, image_size=8),
            replace(pictures.config, exclude={"text": [pictures.captions[0][0]]}),
        ]
        for config in others:
            with pytest.raises(ValueError, match="another data; choose a new folder or delete"):
                write_cache(tmp_path, CaptionedImages(config), vae(), batch_size=8)
        with pytest.raises(ValueError, match="another vae and other data"):
            write_cache(tmp_path, CaptionedImages(others[0]), vae(seed=1), batch_size=8)


def test_latents_without_captions_are_refused(tmp_path: Path, pictures: CaptionedImages) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        mute = CaptionedImages(replace(pictures.config, caption_columns=()))
    with pytest.raises(ValueError, match="caption_columns is empty"):
        write_cache(tmp_path / "cache", mute, vae(), batch_size=8)


def test_the_fingerprint_is_of_configuration_and_weights(tmp_path: Path) -> None:
    def of(vae: VAE) -> str:
        return fingerprint(vae, vae.config.to_dict())

    network, same = vae(), vae()
    assert of(network) == of(same)
    network.save_pretrained(tmp_path)
    assert of(VAE.from_pretrained(tmp_path)) == of(network)
    with torch.no_grad():
        same.decoder.conv_out.bias[0] += 1e-3
    assert of(same) != of(network)
    other = VAE(replace(network.config, scaling_factor=0.8))
    other.load_state_dict(network.state_dict())
    assert of(other) != of(network)


def test_captions_of_any_characters_survive(tmp_path: Path, pictures: CaptionedImages) -> None:
    write_cache(tmp_path, pictures, vae(), batch_size=8)
    odd = ["一\u2028二", "a\nb", 'quote " and \\']
    lines = (tmp_path / "captions.jsonl").read_text(encoding="utf-8").split("\n")
    lines[0] = json.dumps(odd, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert LatentCache(tmp_path, vae=vae())[0]["captions"] == odd
