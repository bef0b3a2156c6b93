"""The latent cache: what the VAE says, written once, never stale."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from latentdiff.data.buckets import nearest
from latentdiff.data.cache import LatentCache, collate_moments
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.samples import Sample
from latentdiff.data.stream import StreamedImages
from latentdiff.images import to_floats
from latentdiff.models.vae import VAE, Posterior, VAEConfig

SIZES = ((16, 16), (40, 12), (10, 32), (20, 20), (40, 22), (17, 16))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    """13 images of several shapes, for buckets of 8 x 32, 16 x 16 and 32 x 8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "set", 13)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        return CaptionedImages(data_config(folder / "set"))


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i in range(count):
            width, height = SIZES[i % len(SIZES)]
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
            row = {
                "file_name": f"{i:03d}.png",
                "text": f"image {i}",
                "more": ["一\u2028", "a\nb"],
            }
            file.write(json.dumps(row) + "\n")


def data_config(data: Path, **fields: Any) -> DataConfig:
    columns = ("text", "more")
    return DataConfig(
        **{
            "data": str(data),
            "image_size": 16,
            "bucket_step": 8,
            "max_aspect": 4.0,
            "caption_columns": columns,
            "num_workers": 2,
            **fields,
        }
    )


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


def write(folder: Path, images: Any, network: VAE | None = None, **options: Any) -> None:
    settings: dict[str, Any] = {"batch_size": 8, "chunk_size": 5, "crop_flip": CropFlip(2, True)}
    write_cache(folder, images, vae() if network is None else network, **settings | options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a cache, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_the_cache_holds_what_the_vae_encodes(tmp_path: Path, images: CaptionedImages) -> None:
    network, crop_flip = vae(), CropFlip(2, True)
    write(tmp_path / "cache", images, network)
    cache = LatentCache(tmp_path / "cache", vae=network)
    assert len(cache) == len(images)
    assert list(cache.captions) == list(images.captions)
    assert cache.image_size == 16
    assert len(set(cache.buckets.tolist())) == 3
    [(_, samples)] = images.chunks(len(images), lambda number: True)
    half = torch.finfo(torch.float16)
    for number, sample in enumerate(samples):
        assert isinstance(sample, Sample)
        size = cache.sizes[cache.buckets[number]]
        assert size == cache.sizes[nearest(sample.image.size, cache.sizes)]
        images = crop_flip.views(sample.image, sample.name, size)
        with torch.no_grad():
            exact = network.encode(to_floats(images))
        batch = collate_moments([cache[number, v] for v in range(crop_flip.num_variants)])
        assert batch["captions"] == [sample.captions] * crop_flip.num_variants
        stored = Posterior.from_moments(batch["moments"])
        for found, expected in ((stored.mean, exact.mean), (stored.logvar, exact.logvar)):
            assert found.dtype == torch.float32
            # Half a unit in the last place; what it adds is float32's, of another batch size.
            torch.testing.assert_close(found, expected, rtol=0.51 * half.eps, atol=1e-6)
        assert torch.equal(cache[number]["moments"], cache[number, 0]["moments"])


def test_without_buckets_and_views_it_is_the_squares(
    tmp_path: Path, images: CaptionedImages
) -> None:
    network = vae()
    squares = reopened(images, tmp_path, bucket_step=0, upscale_limit=2.0)
    write_cache(tmp_path / "cache", squares, network, batch_size=4)
    cache = LatentCache(tmp_path / "cache")
    images = torch.stack([squares.image(i) for i in range(len(squares))])
    with torch.no_grad():
        exact = network.encode(to_floats(images))
    stored = collate_moments([cache[i] for i in range(len(cache))])["moments"]
    torch.testing.assert_close(
        Posterior.from_moments(stored).mean, exact.mean, rtol=1e-3, atol=1e-4
    )
    assert not cache.buckets.any()


def reopened(images: CaptionedImages, tmp_path: Path, **fields: Any) -> CaptionedImages:
    """The same images with other options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        return CaptionedImages(replace(images.config, **fields))


def test_a_stream_is_cached_as_a_set_is(tmp_path: Path, images: CaptionedImages) -> None:
    write(tmp_path / "set", images)
    write(tmp_path / "stream", StreamedImages(replace(images.config, stream=True)))
    stream, whole = contents(tmp_path / "stream"), contents(tmp_path / "set")
    assert stream.pop("header.json") != whole.pop("header.json")  # their fingerprints differ
    assert stream == whole


@pytest.mark.parametrize("masks", [0, 2])
def test_several_processes_write_what_one_writes(
    tmp_path: Path, images: CaptionedImages, masks: int
) -> None:
    network, given = vae(), {"chunk_size": 2, "crop_flip": CropFlip(2, True, masks)}
    write(tmp_path / "one", images, network, **given)
    barrier = Barrier(3)

    def process(rank: int) -> None:
        def on_all(act: Callable[[], None]) -> None:
            act()
            barrier.wait()

        options = {"rank": rank, "world_size": 3, "on_all": on_all}
        write(tmp_path / "three", images, network, **given, **options)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(process, range(3)))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_finished_cache_is_kept(tmp_path: Path, images: CaptionedImages) -> None:
    write(tmp_path, images)
    for path in tmp_path.glob("moments-*.npy"):  # would be written over
        np.lib.format.open_memmap(path, "r+")[:] = 5
    write(tmp_path, images)
    assert (LatentCache(tmp_path, vae=vae())[0]["moments"] == 5).all()


class Cut(Exception):
    """Where the test stops a writer."""


class Watched:
    """The images, noting the chunks that are read, and stopping before one of them."""

    num_samples = None

    def __init__(self, images: CaptionedImages, stop: int = -1) -> None:
        self.images, self.stop = images, stop
        self.config, self.fingerprint = images.config, images.fingerprint
        self.read: list[int] = []

    def chunks(self, size: int, wanted: Any) -> Any:
        for number, samples in self.images.chunks(size, wanted):
            if number == self.stop:
                raise Cut
            self.read.append(number)
            yield number, samples


def test_finished_chunks_are_kept(tmp_path: Path, images: CaptionedImages) -> None:
    write(tmp_path / "whole", images)
    with pytest.raises(Cut):
        write(tmp_path / "cut", Watched(images, 2))
    with pytest.raises(ValueError, match=r"no finished latent cache .*scripts\.cache_latents"):
        LatentCache(tmp_path / "cut")
    next((tmp_path / "cut").glob("moments-00000-*")).write_bytes(b"damaged")
    again = Watched(images)
    write(tmp_path / "cut", again)
    assert again.read == [0, 2]
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


CHANGES = [
    ({"seed": 1}, {}, {}, "its VAE is another"),
    ({}, {"image_size": 24}, {}, "image_size was 16 and is 24"),
    ({}, {"bucket_step": 16}, {}, "bucket_step was 8 and is 16"),
    ({}, {"background": "black"}, {}, "background was 'white' and is 'black'"),
    ({}, {}, {"crop_flip": CropFlip()}, "crops was 2 and is 1; flip was True and is False"),
    ({}, {}, {"crop_flip": CropFlip(2, True, 3)}, "masks was 0 and is 3"),
    ({}, {}, {"chunk_size": 4}, "chunk_size was 5 and is 4"),
    ({"seed": 1}, {"image_size": 24}, {}, "its VAE is another; image_size was 16 and is 24"),
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("network", "data", "options", "named"), CHANGES)
def test_the_cache_of_something_else_is_refused_and_named(
    tmp_path: Path,
    images: CaptionedImages,
    network: dict[str, Any],
    data: dict[str, Any],
    options: dict[str, Any],
    named: str,
    finished: bool,
) -> None:
    """It said "another data" of whatever had changed."""
    if finished:
        write(tmp_path / "cache", images)
    else:
        with pytest.raises(Cut):
            write(tmp_path / "cache", Watched(images, 2))
    before = contents(tmp_path / "cache")
    other = reopened(images, tmp_path, **data) if data else images
    with pytest.raises(ValueError, match=f"holds another cache: {named}; choose a new folder"):
        write(tmp_path / "cache", other, vae(**network), **options)
    assert contents(tmp_path / "cache") == before


def test_the_cache_of_another_vae_is_refused(tmp_path: Path, images: CaptionedImages) -> None:
    write(tmp_path, images)
    with pytest.raises(ValueError, match="another VAE than the one given"):
        LatentCache(tmp_path, vae=vae(seed=1))


def test_a_cache_fits_its_vae_whatever_the_decoder_is(
    tmp_path: Path, images: CaptionedImages
) -> None:
    """A decoder that was trained on alone leaves caches and UNets valid; an encoder does not."""
    write(tmp_path, images)
    other = vae()
    with torch.no_grad():
        for part in (other.decoder, other.post_quant_conv):
            for parameter in part.parameters():
                parameter += 0.1
    other.config = replace(other.config, sample_size=999)
    assert len(LatentCache(tmp_path, vae=other)) == len(images)
    with torch.no_grad():
        bias = other.quant_conv.bias
        assert isinstance(bias, torch.Tensor)
        bias[0] += 1e-3
    with pytest.raises(ValueError, match="another VAE than the one given"):
        LatentCache(tmp_path, vae=other)


def test_caches_of_older_versions_are_refused(tmp_path: Path, images: CaptionedImages) -> None:
    (tmp_path / "header.json").write_text('{"vae": "1", "data": "2", "num_samples": 3}')
    with pytest.raises(ValueError, match="made by another version of latentdiff; delete it"):
        LatentCache(tmp_path)
    with pytest.raises(ValueError, match="made by another version of latentdiff; delete it"):
        write(tmp_path, images)


def test_two_writers_in_one_folder_are_refused(tmp_path: Path, images: CaptionedImages) -> None:
    def on_all(act: Callable[[], None]) -> None:
        act()  # takes the folder
        with pytest.raises(ValueError, match="is being written by another process"):
            write(tmp_path, images)
        raise Cut

    with pytest.raises(Cut):
        write(tmp_path, images, on_all=on_all)


def test_bad_images_are_left_out_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "set", 13)
    Image.new("RGB", (9, 7)).save(tmp_path / "set" / "003.png")
    (tmp_path / "set" / "007.png").write_bytes(b"no image")
    dataset = CaptionedImages(data_config(tmp_path / "set", max_bad=0.2))
    write(tmp_path / "cache", dataset)
    cache = LatentCache(tmp_path / "cache")
    good = [i for i in range(13) if i not in (3, 7)]
    assert [texts[0] for texts in cache.captions] == [f"image {i}" for i in good]
    assert cache.header["left_out"] == {"too small": 1, "cannot be decoded": 1}
    lines = (tmp_path / "cache" / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["too small", "cannot be decoded"]
    assert [json.loads(line)["detail"][:9] for line in lines] == ["'003.png'", "'007.png'"]
    write(tmp_path / "whole", CaptionedImages(data_config(tmp_path / "set", max_bad=0.2)))
    others = [LatentCache(tmp_path / "whole")[i]["moments"] for i in range(11)]
    assert all(torch.equal(cache[i]["moments"], others[i]) for i in range(11))


def test_too_many_bad_images_end_it_with_the_reasons(tmp_path: Path) -> None:
    write_images(tmp_path / "set", 13)
    for name in ("003.png", "011.png", "012.png"):
        (tmp_path / "set" / name).write_bytes(b"no image")
    dataset = CaptionedImages(data_config(tmp_path / "set", max_bad=0.2))
    with pytest.raises(ValueError, match=r"3 of 13 .* max_bad=0.2: 3 cannot be decoded; .*check"):
        write(tmp_path / "cache", dataset)
    assert not (tmp_path / "cache" / "header.json").exists()
    dataset = CaptionedImages(data_config(tmp_path / "set", max_bad=1.0))
    write(tmp_path / "cache", dataset)
    assert len(LatentCache(tmp_path / "cache")) == 10
    for path in (tmp_path / "set").glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image is left of 13"):
        write(tmp_path / "none", CaptionedImages(data_config(tmp_path / "set", max_bad=1.0)))


def test_latents_without_captions_are_refused(tmp_path: Path, images: CaptionedImages) -> None:
    mute = reopened(images, tmp_path, caption_columns=())
    with pytest.raises(ValueError, match="caption_columns is empty"):
        write(tmp_path / "cache", mute)


def test_sizes_that_do_not_suit_the_vae_are_refused(
    tmp_path: Path, images: CaptionedImages
) -> None:
    for fields, message in (
        ({"bucket_step": 1}, "bucket_step=1 must be divisible by 2, the factor of the VAE"),
        ({"bucket_step": 0, "image_size": 15}, "image_size=15 must be divisible by 2"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "cache", reopened(images, tmp_path, **fields))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_read_the_same(
    tmp_path: Path, images: CaptionedImages, start: str
) -> None:
    write(tmp_path, images)
    cache = LatentCache(tmp_path)
    expected = [cache[i] for i in range(len(cache))]
    assert len(pickle.dumps(cache)) < 2000  # nothing that is mapped goes along
    if start == "spawn":  # what such a worker begins with, without the seconds that it takes
        found: Any = pickle.loads(pickle.dumps(cache))
    else:
        found = DataLoader(cache, batch_size=None, num_workers=2, multiprocessing_context=start)
    for example, wanted in zip(found, expected, strict=False):
        assert example["captions"] == wanted["captions"]
        assert torch.equal(example["moments"], wanted["moments"])


def test_a_damaged_file_is_named(tmp_path: Path, images: CaptionedImages) -> None:
    write(tmp_path, images)
    cache = LatentCache(tmp_path)
    for path in tmp_path.glob("moments-00001-*"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        ValueError, match=r"moments-00001-.* is missing or damaged .* encode it anew"
    ):
        cache[7]


def test_the_fingerprint_is_of_everything_that_matters(
    tmp_path: Path, images: CaptionedImages
) -> None:
    write(tmp_path / "0", images)
    write(tmp_path / "1", images, batch_size=3)
    write(tmp_path / "2", images, crop_flip=CropFlip())
    write(tmp_path / "3", images, vae(seed=1))
    write(tmp_path / "4", reopened(images, tmp_path, bucket_step=16, max_bad=1.0))
    write(tmp_path / "5", reopened(images, tmp_path, caption_columns=("text",)))
    prints = [LatentCache(tmp_path / str(i)).fingerprint for i in range(6)]
    assert Counter(prints).most_common(1) == [(prints[0], 2)]
