"""The scripts as users run them: from captioned images to a pipeline folder that draws."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from support.scripts import LAUNCH, ROOT, TWO, launch, run_here

from latentdiff.data.shapes import build_shapes
from latentdiff.formats.weights import load_safetensors
from latentdiff.models.text import TextEncoder
from latentdiff.models.vae import VAE
from latentdiff.pipeline import Pipeline

pytestmark = pytest.mark.training

# Networks that train a step in milliseconds.
TINY = {
    "train_clip": (
        "--clip.text_width=16 --clip.text_layers=1 --clip.image_width=16 --clip.image_layers=1 "
        "--clip.projection_dim=8 --vocab_size=600 --caption_columns=[text,text_zh] "
        "--blur=1 --noise=0.1"
    ),
    "train_vae": "--vae.block_out_channels=[8,8,16] --vae.norm_num_groups=4",
    "train_unet": (
        "--unet.block_out_channels=[8,16] --unet.norm_num_groups=4 --unet.attention_head_dim=2 "
        "--unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] "
        "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D] --caption_dropout=0.5 "
        "--weighting=uncertainty --timestep_distribution=logit_normal --stratified=true "
        "--offset_noise=0.1"
    ),
}
SHORT = "--batch_size=8 --warmup_steps=2 --cooldown_steps=0 --log_every=1 --mixed_precision=no"
TIMED = {"samples_per_second", "data_wait", "memory"}
NETWORKS = {"train_clip": "clip", "train_vae": "vae", "train_unet": "unet"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images, and the variables under which all scripts run."""
    folder = tmp_path_factory.mktemp("home")
    build_shapes(folder / "data", count=160, seed=0, size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield folder


@pytest.fixture(scope="module")
def runs(home: Path) -> Path:
    """The whole chain, each script by `accelerate launch`."""
    runs = home / "runs"
    launch(LAUNCH, "train_clip", *arguments("train_clip", home, runs / "clip", 4))
    launch(LAUNCH, "train_vae", *arguments("train_vae", home, runs / "vae", 4), "--num_workers=1")
    cached = ["--data", f"{home}/data", "--image_size=32", "--vae", f"{runs}/vae/model"]
    # After four steps no VAE is fit to train on.
    launch(
        LAUNCH, "cache_latents", *cached, "--output_dir", f"{runs}/cache", "--check_latents=false"
    )
    launch(LAUNCH, "train_unet", *arguments("train_unet", home, runs / "unet", 4))
    return runs


def arguments(name: str, home: Path, output_dir: Path, max_steps: int) -> list[str]:
    """The command line of a script, short and tiny; the UNet reads what the others left."""
    args = [*TINY[name].split(), *SHORT.split(), f"--max_steps={max_steps}"]
    args += ["--checkpoint_every=2", "--preview_every=4", "--output_dir", str(output_dir)]
    if name != "train_unet":
        return [*args, "--data", f"{home}/data", "--image_size=32"]
    runs = home / "runs"
    args += ["--vae", f"{runs}/vae/model", "--text_encoder", f"{runs}/clip/model"]
    return [*args, "--cache", f"{runs}/cache"]


def log(folder: Path) -> list[dict[str, float]]:
    """The records of training steps; test_validation.py has those of what is held out."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def untimed(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k not in TIMED} for r in records]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_folder_has_all_its_parts(runs: Path, name: str) -> None:
    folder = runs / NETWORKS[name]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert (config["max_steps"], config["batch_size"], config["seed"]) == (4, 8, 0)
    records = log(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    fields = {"step", "loss", "grad_norm", "learning_rate", "skipped", *TIMED}
    assert all(fields <= record.keys() for record in records)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["latest", "step-2", "step-4"]
    for image in ("loss.png", "previews/step-0000004.png"):
        assert (folder / image).read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp"))


def test_clip_leaves_a_text_encoder_for_the_unet(runs: Path) -> None:
    context = TextEncoder.from_pretrained(runs / "clip" / "model")(["a red circle", "红色"])
    assert context.shape == (2, 24, 16)
    state = load_safetensors(runs / "clip/checkpoints/step-4/clip.safetensors")
    for part, prefix in (("text_encoder", "ema."), ("clip", "ema.")):
        saved = load_safetensors(runs / "clip/model" / part / "model.safetensors")
        names = [name for name in saved if prefix + name in state]
        assert names
        assert all(torch.equal(saved[name], state[prefix + name]) for name in names)


def test_vae_leaves_standard_latents_and_the_same_images(runs: Path) -> None:
    """What the EMA network decodes, with the statistics of its latents folded in."""
    folded = VAE.from_pretrained(runs / "vae" / "model")
    state = load_safetensors(runs / "vae/checkpoints/step-4/vae.safetensors")
    ema = VAE(folded.config)
    ema.load_state_dict({k.removeprefix("ema."): v for k, v in state.items() if k[:4] == "ema."})
    moments = torch.from_numpy(np.load(runs / "cache" / "moments-00000-32x32.npy")).float()
    mean, logvar = moments[:, 0].chunk(2, dim=1)  # of the only view
    variance = mean.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=2e-3)
    torch.testing.assert_close(variance, torch.ones(4), rtol=5e-3, atol=0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            folded.decode(folded.encode(images).mean),
            ema.decode(ema.encode(images).mean),
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_scripts_resume_bit_for_bit(home: Path, runs: Path, tmp_path: Path, name: str) -> None:
    """The chain's run, thrown back to step 2 as by a crash, arrives where it was before."""
    whole, part = runs / NETWORKS[name], tmp_path / "run"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-4")
    shutil.rmtree(part / "model")
    (part / "checkpoints" / ".step-4.tmp").mkdir()
    with (part / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run_here(name, *arguments(name, home, part, 4))
    assert untimed(log(part)) == untimed(log(whole))
    state = f"checkpoints/step-4/{NETWORKS[name]}.safetensors"
    found, expected = load_safetensors(part / state), load_safetensors(whole / state)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    kept = sorted(path.name for path in (part / "checkpoints").iterdir())
    assert kept == ["latest", "step-2", "step-4"]
    for path in (whole / "model").rglob("*.safetensors"):
        again = load_safetensors(part / path.relative_to(whole))
        assert all(torch.equal(again[key], value) for key, value in load_safetensors(path).items())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_command_with_more_steps_goes_on(
    home: Path, runs: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(runs / NETWORKS[name], tmp_path / "run")
    run_here(name, *arguments(name, home, tmp_path / "run", 6))
    records = log(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[:4] == log(runs / NETWORKS[name])
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step-4", "step-6"]
    assert (tmp_path / "run" / "previews" / "step-0000006.png").is_file()


# diffusers' own business, inside its DPMSolverMultistepScheduler.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_trained_folder_draws_with_ours_and_with_diffusers(runs: Path) -> None:
    folder = runs / "unet" / "model"
    options = {"guidance_scale": 3.0, "num_inference_steps": 3}
    ours = Pipeline.from_pretrained(folder)
    drawn = ours("a red circle", seed=0, progress=False, **options).images
    assert [image.size for image in drawn] == [(32, 32)]
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = theirs("a red circle", generator=generator, **options).images
    assert [image.size for image in drawn] == [(32, 32)]


@pytest.mark.processes
@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_as_one(home: Path, runs: Path, tmp_path: Path, name: str) -> None:
    """The same global batch, captions, noise and crops; only sums are in another order."""
    args = arguments(name, home, tmp_path / "run", 3)
    if name == "train_unet":  # which then encodes the data itself, each process its share
        args = [arg for arg in args if arg not in ("--cache", f"{runs}/cache")]
        args += ["--data", f"{home}/data", "--image_size=32", "--check_latents=false"]
    launch(TWO, name, *args)
    found, expected = log(tmp_path / "run"), log(runs / NETWORKS[name])
    assert [record["step"] for record in found] == [1, 2, 3]
    for record, alone in zip(found, expected, strict=False):
        for field in record.keys() - TIMED:
            assert record[field] == pytest.approx(alone[field], rel=1e-4, abs=1e-7), field
    if name == "train_unet":
        for file in ("moments-00000-32x32.npy", "index.npy", "samples.arrow", "header.json"):
            written = (tmp_path / "run" / "cache" / file).read_bytes()
            assert written == (runs / "cache" / file).read_bytes()


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_accumulation_trains_as_whole_batches_do(
    home: Path, runs: Path, tmp_path: Path, name: str
) -> None:
    args = arguments(name, home, tmp_path / "run", 3)
    run_here(name, *args, "--gradient_accumulation_steps=4")
    found, expected = log(tmp_path / "run"), log(runs / NETWORKS[name])
    assert [record["step"] for record in found] == [1, 2, 3]
    for record, whole in zip(found, expected, strict=False):
        for field in record.keys() - TIMED:
            assert record[field] == pytest.approx(whole[field], rel=1e-4, abs=1e-7), field


@pytest.mark.parametrize("name", ["train_clip", "train_vae", "cache_latents", "train_unet"])
def test_default_networks_train_on_default_terms(home: Path, tmp_path: Path, name: str) -> None:
    """All that a script does without arguments, but for the number of images and steps."""
    args = ["--data", f"{home}/data", "--output_dir", str(tmp_path / "run")]
    if name in ("cache_latents", "train_unet"):
        args.append("--vae=emoji")
    if name == "train_unet":
        args.append("--text_encoder=emoji")
    if name != "cache_latents":
        args += ["--max_steps=1", "--mixed_precision=no"]
    run_here(name, *args)
    written = "header.json" if name == "cache_latents" else "checkpoints/step-1/manifest.json"
    assert (tmp_path / "run" / written).is_file()


def not_their_vae(home: Path) -> list[str]:
    """The embedded model's, of drawings, would be taken for any data, without a word."""
    return ["cache_latents", "--data", f"{home}/data"]


def not_its_vae(home: Path) -> list[str]:
    return ["train_unet", "--data", f"{home}/data", "--text_encoder", f"{home}/runs/clip/model"]


def not_their_text_encoder(home: Path) -> list[str]:
    args = arguments("train_unet", home, home / "without", 1)
    position = args.index("--text_encoder")
    return ["train_unet", *args[:position], *args[position + 2 :]]


def no_vae(home: Path) -> list[str]:
    args = ["--data", f"{home}/data", "--text_encoder", f"{home}/runs/clip/model"]
    return ["train_unet", *args, "--vae", f"{home}/nowhere"]


def no_text_encoder(home: Path) -> list[str]:
    vae = f"{home}/runs/vae/model"
    return ["train_unet", "--vae", vae, "--text_encoder", vae, "--cache", f"{home}/runs/cache"]


def other_vae(home: Path) -> list[str]:
    vae = VAE.from_pretrained(home / "runs/vae/model")
    torch.nn.init.normal_(vae.encoder.conv_in.weight)
    vae.save_pretrained(home / "other")
    args = arguments("train_unet", home, home / "refused", 1)
    return ["train_unet", *args, "--vae", f"{home}/other"]


def other_network(home: Path) -> list[str]:
    args = arguments("train_vae", home, home / "runs/vae", 9)
    return ["train_vae", *args, "--vae.block_out_channels=[8,16]"]


def no_data(home: Path) -> list[str]:
    return ["train_vae", "--data", f"{home}/nowhere"]


def no_captions(home: Path) -> list[str]:
    return ["train_clip", "--data", f"{home}/data", "--caption_columns=[]"]


def parts_of_a_batch(home: Path) -> list[str]:
    return ["train_clip", "--data", f"{home}/data", "--gradient_accumulation_steps=2"]


def odd_patches(home: Path) -> list[str]:
    return ["train_clip", "--data", f"{home}/data", "--image_size=36"]


def odd_size(home: Path) -> list[str]:
    return ["train_vae", "--data", f"{home}/data", "--image_size=30"]


def odd_cache(home: Path) -> list[str]:
    vae = f"{home}/runs/vae/model"
    return ["cache_latents", "--data", f"{home}/data", "--image_size=30", "--vae", vae]


def large_batch(home: Path) -> list[str]:
    """Which is said before the networks are looked for."""
    args = ["--batch_size=200", "--cache", f"{home}/runs/cache"]
    return ["train_unet", *args, "--vae", f"{home}/nowhere", "--text_encoder", f"{home}/nowhere"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (not_their_vae, "vae must be given: data="),
        (not_its_vae, "vae must be given: data="),
        (not_their_text_encoder, "text_encoder must be given: data="),
        (no_vae, "nowhere"),
        (no_text_encoder, "holds no text encoder: text_encoder/config.json is missing"),
        (other_vae, "was encoded by another VAE"),
        (
            other_network,
            "another configuration: vae.block_out_channels was [8, 8, 16] and is [8, 16]",
        ),
        (no_data, "nowhere' is no file or folder here"),
        (no_captions, "caption_columns is empty"),
        (parts_of_a_batch, "gradient_accumulation_steps=2 must be 1: the contrastive loss"),
        (odd_patches, "image_size=36 must be divisible by patch_size=8"),
        (odd_size, "30) must be divisible by 4"),
        (odd_cache, "image_size=30 must be divisible by 4, the factor of the VAE"),
        (large_batch, "batch_size=200 must be at most"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    home: Path,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: Callable[[Path], list[str]],
    message: str,
) -> None:
    name, *args = wrong(home)
    if "--output_dir" not in args:
        args += ["--output_dir", str(tmp_path / "run")]
    if not any(arg.startswith("--mixed_precision") for arg in args) and name != "cache_latents":
        args.append("--mixed_precision=no")
    with pytest.raises(SystemExit) as caught:
        run_here(name, *args)
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    if wrong is other_network:  # the configuration to go back to is still there
        config = (home / "runs/vae/config.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(config)["vae"]["block_out_channels"] == [8, 8, 16]


@pytest.mark.processes
def test_a_wrong_command_line_ends_with_code_2_and_no_traceback(home: Path) -> None:
    command = [sys.executable, str(ROOT / "train" / "train_vae.py"), "--batchsize=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: batchsize is no option; did you mean batch_size?\n"
