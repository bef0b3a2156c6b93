"""Images, latents and captions in memory: the batches, and so the weights, have the same bits."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.scripts import TWO, launch, run_here
from test_cache import data_config, vae, write, write_images
from test_end_to_end import NETWORKS, SHORT, TINY, log, untimed

from latentdiff.data.batches import batches
from latentdiff.data.cache import LatentCache, collate_moments
from latentdiff.data.caption_table import CaptionTable, CaptionTokens
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.resident import ResidentImages, ResidentLatents
from latentdiff.data.shapes import build_shapes
from latentdiff.formats.weights import load_safetensors
from latentdiff.tasks.ahead import ahead
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.vae.config import TrainVAE
from latentdiff.training.accelerator import ComputeConfig
from latentdiff.training.randomness import choose
from latentdiff.training.validation import Subset

pytestmark = pytest.mark.filterwarnings("ignore:the VAE in .* is not fit")  # it is untrained

CPU = torch.device("cpu")
HELD = ComputeConfig(in_memory=True)
ROWS = [["a", "b", "a"], ["b"], ["", "a"], [f"{i}" for i in range(200)]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def letters(texts: list[str]) -> torch.Tensor:
    """Token ids (b, 4) of short texts."""
    return torch.tensor([[ord(letter) for letter in text.ljust(4)] for text in texts])


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1, exclude_max=True, width=32))))
def test_a_table_chooses_the_caption_that_the_lists_do(drawn: list[tuple[int, float]]) -> None:
    rows, u = np.array([row for row, _ in drawn], np.int64), torch.tensor([x for _, x in drawn])
    table = CaptionTable(ROWS)
    expected = choose([ROWS[row] for row in rows], u.tolist())
    assert [table.texts[number] for number in table.choose(rows, u)] == expected


def test_tokens_are_those_of_the_chosen_captions_or_of_none() -> None:
    table = CaptionTable(ROWS)
    assert len(table.texts) == len(set(table.texts))
    tokens, rows = CaptionTokens(table, letters), np.array([3, 1, 0])
    u, empty = torch.tensor([0.999, 0.3, 0.5]), np.array([False, True, False])
    assert tokens(rows, u, empty=empty).equal(letters(["199", "", "b"]))
    assert tokens(rows, u).equal(letters(["199", "b", "b"]))


@pytest.mark.parametrize(("rank", "world_size", "masks"), [(0, 1, 0), (1, 2, 0), (0, 1, 2)])
def test_latents_in_memory_are_those_on_disk(
    tmp_path: Path, rank: int, world_size: int, masks: int
) -> None:
    """Three sizes, four variants or eight, a validation split, and a start in the middle."""
    write_images(tmp_path / "set", 40)
    images = CaptionedImages(data_config(tmp_path / "set"))
    write(tmp_path / "cache", images, crop_flip=CropFlip(2, True, masks))
    cache, val = LatentCache(tmp_path / "cache"), np.array([3, 4, 30])

    def variants(step: int) -> list[int]:
        return [(step + i) % cache.crop_flip.num_variants for i in range(4)]

    options: dict[str, Any] = {"batch_size": 4, "seed": 1, "stop": 30, "variants": variants}
    options |= {"rank": rank, "world_size": world_size}
    train = Subset(cache, val)
    read = batches(
        train,
        5,
        num_samples=len(train),
        buckets=np.delete(cache.buckets, val),
        collate=collate_moments,
        **options,
    )
    examples = np.delete(np.arange(len(cache)), val)
    held = list(ResidentLatents(cache, CPU).batches(5, examples=examples, **options))
    assert len(held) == 25
    assert len({batch["moments"].shape for batch in held}) == 3
    for found, expected in zip(held, read, strict=True):
        assert found["moments"].equal(expected["moments"])
        assert [cache.captions[int(row)] for row in found["rows"]] == expected["captions"]


def test_a_damaged_file_of_latents_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "set", 12)
    write(tmp_path / "cache", CaptionedImages(data_config(tmp_path / "set")))
    file = next(iter(sorted((tmp_path / "cache").glob("moments-*.npy"))))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{file.name} is missing or damaged .*encode it anew"):
        ResidentLatents(LatentCache(tmp_path / "cache"), CPU)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:a sample is replaced by the next")
def test_images_in_memory_are_those_on_disk(tmp_path: Path, num_workers: int) -> None:
    """A damaged image is replaced by the same other one, with that one's captions."""
    write_images(tmp_path / "set", 12)
    (tmp_path / "set" / "005.png").write_bytes(b"no image")
    config = data_config(tmp_path / "set", max_bad=0.2, upscale_limit=4.0, num_workers=num_workers)
    read, held = CaptionedImages(config), CaptionedImages(config)
    options: dict[str, Any] = {"batch_size": 5, "seed": 0, "stop": 6}
    resident = ResidentImages(held, CPU)
    found = list(resident.batches(1, **options))
    for batch, expected in zip(found, read.batches(1, **options), strict=True):
        assert batch["images"].equal(expected["images"])
        zeros = torch.zeros(5)
        chosen = resident.captions.choose(batch["rows"], zeros)
        texts = [resident.captions.texts[number] for number in chosen]
        assert texts == choose(expected["captions"], zeros.tolist())
    assert held.replaced.keys() == {5}


@pytest.mark.parametrize("make", [TrainVAE, TrainCLIP])
def test_a_stream_is_not_held_in_memory(make: Any) -> None:
    columns = () if make is TrainVAE else ("text",)
    data = DataConfig(stream=True, caption_columns=columns)
    with pytest.raises(ValueError, match=r"in_memory=True must be False with stream=True"):
        make(compute=HELD, data=data)


@pytest.mark.parametrize("threads", [0, 1])
def test_batches_made_ahead_are_those_of_their_steps(threads: int) -> None:
    def loader(start: int) -> Iterator[dict[str, Any]]:
        yield from ({"images": torch.full((2,), step), "rows": [step]} for step in range(start, 9))

    def prepare(batch: dict[str, Any], step: int) -> dict[str, Any]:
        if step == 8:
            raise ValueError("the last")
        return {"images": batch["images"], "noise": torch.full((2,), batch["rows"][0] + step)}

    found = ahead(loader, prepare, CPU, threads=threads)(4)
    for step in range(4, 8):
        batch = next(found)
        assert batch["images"].tolist() == [step, step]
        assert batch["noise"].tolist() == [2 * step, 2 * step]
    with pytest.raises(ValueError, match="the last"):
        next(found)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shapes, and a cache of them with crops and flips by an untrained VAE."""
    folder = tmp_path_factory.mktemp("home")
    build_shapes(folder / "data", count=120, seed=0, size=32)
    vae().save_pretrained(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        options = f"--data={folder}/data --image_size=32 --vae={folder}/vae --check_latents=false"
        run_here("cache_latents", *options.split(), "--flip=true", f"--output_dir={folder}/cache")
        yield folder


def arguments(name: str, home: Path, output_dir: Path, **options: str) -> list[str]:
    args = [*TINY[name].split(), *SHORT.split(), "--max_steps=6", "--checkpoint_every=3"]
    args += ["--preview_every=6", f"--output_dir={output_dir}"]
    args += [f"--{key}={value}" for key, value in options.items()]
    if name == "train_unet":
        args += [f"--cache={home}/cache", f"--vae={home}/vae", "--text_encoder=emoji"]
        return [*args, "--val_fraction=0.1"]
    args += ["--random_flip=true"] if name == "train_vae" else ["--val_fraction=0.1"]
    return [*args, f"--data={home}/data", "--image_size=32"]


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_safetensors(folder / "checkpoints" / "step-6" / f"{NETWORKS[name]}.safetensors")


def same_run(one: Path, other: Path, name: str) -> None:
    found, expected = state(one, name), state(other, name)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert untimed(log(one)) == untimed(log(other))


@pytest.mark.training
@pytest.mark.parametrize("name", ["train_unet", "train_clip", "train_vae"])
def test_a_run_in_memory_has_the_same_bits_and_goes_on_so(
    home: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that was begun without, and goes on in memory from its middle."""
    read, held, mixed = tmp_path / "read", tmp_path / "held", tmp_path / "mixed"
    run_here(name, *arguments(name, home, read))
    run_here(name, *arguments(name, home, held, in_memory="true"))
    assert "MiB of cpu" in capsys.readouterr().out
    same_run(held, read, name)
    shutil.copytree(read, mixed)
    shutil.rmtree(mixed / "checkpoints" / "step-6")
    run_here(name, *arguments(name, home, mixed, in_memory="true"))
    same_run(mixed, read, name)


@pytest.mark.training
def test_micro_batches_in_memory_are_those_on_disk(home: Path, tmp_path: Path) -> None:
    read, held = tmp_path / "read", tmp_path / "held"
    parts = {"gradient_accumulation_steps": "2"}
    run_here("train_unet", *arguments("train_unet", home, read, **parts))
    run_here("train_unet", *arguments("train_unet", home, held, **parts, in_memory="true"))
    same_run(held, read, "train_unet")


@pytest.mark.processes
@pytest.mark.parametrize("name", ["train_unet", "train_clip", "train_vae"])
def test_two_processes_in_memory_have_the_bits_of_two_that_read(
    home: Path, tmp_path: Path, name: str
) -> None:
    read, held = tmp_path / "read", tmp_path / "held"
    launch(TWO, name, *arguments(name, home, read))
    launch(TWO, name, *arguments(name, home, held, in_memory="true"))
    same_run(held, read, name)
