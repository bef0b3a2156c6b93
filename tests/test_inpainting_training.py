"""Training an inpainting network: it starts from what a model draws, and leaves one that paints."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from support.interchange_table import DIFFUSERS, Measured
from support.scripts import ROOT, run_here, script
from support.tiny import tiny_pipeline
from test_editing import EPSILON, draw, draw_in_diffusers, left_half, make_image
from test_end_to_end import log, untimed

from latentdiff.data.shapes import build_shapes
from latentdiff.pipeline import Pipeline

pytestmark = [
    pytest.mark.training,
    pytest.mark.filterwarnings("ignore:the VAE in .* is not fit"),  # it is untrained
]

SHORT = (
    "--batch_size=4 --warmup_steps=2 --cooldown_steps=0 --log_every=1 --mixed_precision=no "
    "--max_steps=6 --checkpoint_every=3 --preview_every=6 --val_fraction=0.1 --learning_rate=1e-3"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shapes, a tiny model, and caches of it with masks and without."""
    folder = tmp_path_factory.mktemp("home")
    build_shapes(folder / "data", count=60, seed=0, size=16)
    tiny_pipeline(folder / "tokens", EPSILON).save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        options = f"--data={folder}/data --image_size=16 --vae={folder}/tiny --check_latents=false"
        for name, masks in (("plain", 0), ("one", 1), ("masked", 3)):
            where = (f"--masks={masks}", f"--output_dir={folder}/{name}")
            run_here("cache_latents", *options.split(), *where)
        yield folder


def arguments(home: Path, output_dir: Path, *more: str, cache: str = "masked") -> list[str]:
    painting = [] if cache == "plain" else ["--inpainting=true"]
    given = [f"--init={home}/tiny", f"--cache={home}/{cache}", f"--output_dir={output_dir}"]
    return [*SHORT.split(), *painting, *given, *more]


def weights(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints" / "step-6"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    run_here("train_unet", *arguments(home, home / "run"))
    return home / "run"


def test_the_first_step_is_that_of_the_model_as_it_was(home: Path, tmp_path: Path) -> None:
    """Noise and timesteps are the same, and what is new is read with weights of 0."""
    losses = {}
    for cache in ("plain", "one"):
        run_here("train_unet", *arguments(home, tmp_path / cache, cache=cache))
        losses[cache] = [line["loss"] for line in log(tmp_path / cache) if "loss" in line]
    assert losses["one"][0] == pytest.approx(losses["plain"][0], rel=1e-5)
    assert losses["one"][5] != pytest.approx(losses["plain"][5], rel=1e-4)


def test_the_new_channels_are_learned_and_its_model_paints(home: Path, trained: Path) -> None:
    pipeline = Pipeline.from_pretrained(trained / "model")
    assert pipeline.inpaints
    before = Pipeline.from_pretrained(home / "tiny").unet.conv_in.weight
    after = pipeline.unet.conv_in.weight
    assert after.shape == (16, 9, 3, 3)
    assert after[:, 4:].flatten(1).any(1).all()
    assert not after[:, :4].equal(before)
    original = make_image(3)
    output = pipeline("a cat", steps=2, image=original, mask_image=left_half(), progress=False)
    kept, drawn = (np.asarray(image)[:, 8:] for image in (original, output.images[0]))
    assert np.array_equal(kept, drawn)
    with Image.open(trained / "previews" / "step-0000006.png") as preview:
        assert preview.width > 128


@pytest.mark.interchange
def test_the_trained_model_paints_the_same_in_diffusers(trained: Path, measured: Measured) -> None:
    given: dict[str, Any] = {"image": make_image(1), "mask_image": left_half(), "strength": 1.0}
    ours = draw(trained / "model", **given)
    theirs = draw_in_diffusers(
        StableDiffusionInpaintPipeline, trained / "model", height=16, width=16, **given
    )
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    measured("folder, trained to inpaint", "read", DIFFUSERS, "latents after 10 steps", difference)
    assert difference < 1e-5


def test_a_run_in_memory_has_the_same_bits(home: Path, trained: Path, tmp_path: Path) -> None:
    run_here("train_unet", *arguments(home, tmp_path, "--in_memory=true"))
    assert weights(tmp_path) == weights(trained)
    assert untimed(log(tmp_path)) == untimed(log(trained))


def test_data_is_encoded_with_masks_into_the_run(home: Path, trained: Path, tmp_path: Path) -> None:
    """And so are the masks those of the cache that is made beforehand."""
    given = f"--data={home}/data --image_size=16 --masks=3 --cache=null".split()
    run_here("train_unet", *arguments(home, tmp_path, *given, "--num_workers=2"))
    assert weights(tmp_path) == weights(trained)


@pytest.mark.processes
def test_a_killed_run_goes_on_with_the_same_bits(home: Path, trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train" / "train_unet.py"), *arguments(home, tmp_path)]
    known = os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": known})
    while not (tmp_path / "checkpoints" / "step-3").is_dir() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "checkpoints" / "step-6").is_dir()
    run_here("train_unet", *arguments(home, tmp_path))
    assert weights(tmp_path) == weights(trained)
    assert untimed(log(tmp_path)) == untimed(log(trained))


@pytest.mark.parametrize(
    ("more", "cache", "sentence"),
    [
        ([], "plain --inpainting=true", r"plain has no masked images, .* --masks 4"),
        (["--inpainting=false"], "masked", r"masked has masks=3 and is for inpainting=true"),
        (["--lora.rank=2"], "masked", r"lora must be null: init=.* has no channels for mask"),
        (["--preview_prompts=[a cat]"], "masked", "preview_prompts=.* has no effect"),
        (["--cache=null"], "masked", "masks=0 must be at least 1 with inpainting=true"),
        (["--masks=2"], "masked", "masks=2 has no effect with cache="),
    ],
)
def test_what_does_not_fit_is_refused(
    home: Path, tmp_path: Path, more: list[str], cache: str, sentence: str
) -> None:
    cache, *options = cache.split()
    with pytest.raises(ValueError, match=sentence):
        refused(*arguments(home, tmp_path, *options, *more, cache=cache))


def refused(*args: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train/train_unet.py", *args])
        script("train_unet").main()


def test_an_inpainting_model_is_taken_as_it_is_and_for_that_alone(
    home: Path, trained: Path, tmp_path: Path
) -> None:
    """By a run that trains all of it, or a LoRA."""
    again = [*arguments(home, tmp_path / "lora", "--lora.rank=2"), f"--init={trained}/model"]
    run_here("train_unet", *again)
    [file] = (tmp_path / "lora" / "model").glob("*.safetensors")
    pipeline = Pipeline.from_pretrained(trained / "model")
    pipeline.loras.load(file)
    with pytest.raises(ValueError, match=r"init=.* is an inpainting model: inpainting must be"):
        refused(*arguments(home, tmp_path, cache="plain"), f"--init={trained}/model")


@pytest.mark.parametrize("network", ["--unet", "--dit"])
def test_a_new_network_has_the_channels(home: Path, tmp_path: Path, network: str) -> None:
    given = {
        "--unet": "--unet.block_out_channels=[8,16] --unet.norm_num_groups=4 "
        "--unet.attention_head_dim=2 --unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] "
        "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D]",
        "--dit": "--dit.num_layers=1 --dit.num_attention_heads=2 --dit.attention_head_dim=8",
    }[network]
    more = f"--init=null --vae={home}/tiny --text_encoder={home}/tiny {given}".split()
    run_here("train_unet", *arguments(home, tmp_path, *more))
    pipeline = Pipeline.from_pretrained(tmp_path / "model")
    assert pipeline.unet.config.in_channels == 9
    assert pipeline.inpaints
