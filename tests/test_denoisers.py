"""Every kind of denoiser from training to images: a DiT, and UNets whose text joins the time."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from support.cases import mostly_exhaustive
from support.parity import fill, same_weights
from support.scripts import TWO, launch, run_here
from support.tiny import CONTEXT_DIM, UNET, tiny_pipeline, tiny_text_encoder
from test_cache import vae, write_images
from test_interchange import assert_same_image, load_in_diffusers

from latentdiff.cli import main
from latentdiff.formats.weights import load_safetensors
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.unet import UNet
from latentdiff.pipeline import Pipeline

# The networks of the trainings here have learned nothing, which the latent check says.
pytestmark = pytest.mark.filterwarnings("ignore:the VAE in .* is not fit")

DIT = DiTConfig(
    sample_size=8,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=CONTEXT_DIM,
)
DENOISERS = {
    "dit": DIT,
    "dit, joint attention": replace(DIT, attention="joint", pooled_text=True),
    "text added": replace(UNET, addition_embed_type="text", addition_embed_type_num_heads=2),
    "text beside": replace(
        UNET, class_embed_type="simple_projection", class_embeddings_concat=True
    ),
}
DITS = [name for name, config in DENOISERS.items() if isinstance(config, DiTConfig)]
each = pytest.mark.parametrize("name", DENOISERS)


def pipeline(name: str, scratch: Path) -> Pipeline:
    """Random weights in every layer."""
    base, config = tiny_pipeline(scratch), DENOISERS[name]
    torch.manual_seed(1)
    denoiser = DiT(config) if isinstance(config, DiTConfig) else UNet(config)
    fill(denoiser)
    return Pipeline(
        unet=denoiser.eval(),
        vae=base.vae,
        text_encoder=base.text_encoder,
        diffusion=base.diffusion,
    )


def draw(pipe: Pipeline, prompt: str = "a cat", **options: int) -> bytes:
    drawn = pipe(prompt, seed=3, steps=3, guidance_scale=3.0, progress=False, **options)
    return drawn.images[0].tobytes()


@pytest.mark.parametrize("name", mostly_exhaustive(DENOISERS, quick=2))
def test_a_folder_draws_what_the_model_drew_before_it_was_saved(tmp_path: Path, name: str) -> None:
    before = pipeline(name, tmp_path / "scratch")
    before.save_pretrained(tmp_path / "model")
    after = Pipeline.from_pretrained(tmp_path / "model")
    assert after.unet.config == before.unet.config
    assert after.fingerprint() == before.fingerprint()
    assert draw(after) == draw(before)
    assert draw(after, "a dog") != draw(before)
    assert draw(after, height=24, width=40) == draw(before, height=24, width=40)
    half = tmp_path / "half"
    before.save_pretrained(half, dtype=torch.float16)
    assert main(["convert", str(half), str(tmp_path / "again")]) == 0
    part = "transformer" if name in DITS else "unet"
    weights = f"{part}/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (half / weights).read_bytes()


# diffusers' own business, inside its DPMSolverMultistepScheduler.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_diffusers_opens_a_unet_with_added_text_and_draws_our_image(tmp_path: Path) -> None:
    pipeline("text added", tmp_path / "scratch").save_pretrained(tmp_path / "model")
    assert_same_image(tmp_path / "model", load_in_diffusers(tmp_path / "model"), "dpmpp_2m")


def test_of_a_unet_with_text_beside_the_time_diffusers_opens_the_network_alone(
    tmp_path: Path,
) -> None:
    """No pipeline of its has a class to give that is the mean of the text."""
    ours = pipeline("text beside", tmp_path / "scratch")
    ours.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute LatentDiffPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert same_weights(ours.unet, theirs)


@pytest.mark.parametrize("name", DITS)
def test_diffusers_refuses_the_folder_of_a_dit(tmp_path: Path, name: str) -> None:
    pipeline(name, tmp_path / "scratch").save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute LatentDiffPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)
    with pytest.raises((ValueError, TypeError), match=r"unet|transformer"):
        StableDiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", DITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dit_in_half_precision_draws_nearly_the_same_image(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    pipeline(name, tmp_path / "scratch").save_pretrained(tmp_path / "model")
    full, half = (
        np.frombuffer(draw(Pipeline.from_pretrained(tmp_path / "model", dtype=kind)), np.uint8)
        for kind in (torch.float32, dtype)
    )
    assert np.abs(full.astype(float) - half).mean() < 8


def test_another_transformer_is_not_taken_for_ours(tmp_path: Path) -> None:
    pipeline("dit", tmp_path / "scratch").save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "transformer": ["diffusers", "SD3Transformer2DModel"]}))
    with pytest.raises(
        ValueError, match=r"not a whole pipeline folder; missing: unet/config\.json"
    ):
        Pipeline.from_pretrained(tmp_path)
    path.write_text(json.dumps({**index, "unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(
        ValueError, match=r"unet is .*UNet2DConditionModel.*, which is not read here"
    ):
        Pipeline.from_pretrained(tmp_path)
    path.write_text(json.dumps(index))
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing: transformer/diffusion_pytorch_model"):
        Pipeline.from_pretrained(tmp_path)


@each
def test_a_single_file_has_no_place_for_it_and_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"has no place in a single file, whose readers expect"):
        pipeline(name, tmp_path).save_single_file(tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_lora_is_for_a_unet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"style.*LoRAs are for a UNet, and this is a DiT"):
        pipeline("dit", tmp_path).loras.load(tmp_path / "style.safetensors")


def test_a_size_that_the_patches_do_not_divide_is_refused_in_words(tmp_path: Path) -> None:
    """The VAE divides by 2, and a patch by 2 once more."""
    pipe = pipeline("dit", tmp_path)
    with pytest.raises(
        ValueError, match=r"height=18 must be divisible by 4, the factor of the VAE"
    ):
        draw(pipe, height=18)


# --- trained


TINY = {
    "dit": "--dit.num_layers=2 --dit.num_attention_heads=2 --dit.attention_head_dim=8",
    "unet": (
        "--unet.block_out_channels=[8,16] --unet.norm_num_groups=4 --unet.attention_head_dim=2 "
        "--unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] "
        "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D]"
    ),
}
OPTIONS = {
    "dit": TINY["dit"],
    "dit, joint attention": f"{TINY['dit']} --dit.attention=joint --dit.pooled_text=true",
    "text added": (
        f"{TINY['unet']} --unet.addition_embed_type=text --unet.addition_embed_type_num_heads=4"
    ),
    "text beside": (
        f"{TINY['unet']} --unet.class_embed_type=simple_projection "
        "--unet.class_embeddings_concat=true"
    ),
}
SHORT = (
    "--max_steps=6 --batch_size=4 --mixed_precision=no --log_every=1 --checkpoint_every=3 "
    "--preview_every=6 --validate_every=6 --val_fraction=0.1 --warmup_steps=1 --ema_lengths=[0.1] "
    "--snapshot_every=1 --learning_rate=1e-2"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images, networks, and a cache."""
    folder = tmp_path_factory.mktemp("home")
    write_images(folder / "set", 40)
    vae().save_pretrained(folder / "vae")
    tiny_text_encoder(folder / "tokens").save_pretrained(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        run_here("cache_latents", *cache_options(folder).split())
        yield folder


def cache_options(home: Path) -> str:
    return (
        f"--data={home / 'set'} --output_dir={home / 'cache'} --vae={home / 'vae'} "
        "--image_size=16 --upscale_limit=4 --check_latents=false"
    )


def options(home: Path, name: str, run: str) -> list[str]:
    read = f"--cache={home / 'cache'} --vae={home / 'vae'} --text_encoder={home / 'text'}"
    return f"--output_dir={home / run} {read} {SHORT} {OPTIONS[name]}".split()


def train(home: Path, name: str, run: str, *more: str) -> Path:
    """Run the script in this process; the run's folder."""
    run_here("train_unet", *options(home, name, run), *more)
    return home / run


def losses(run: Path, field: str = "loss") -> list[float]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record[field] for record in map(json.loads, lines) if field in record]


def ema(run: Path, name: str) -> dict[str, torch.Tensor]:
    learner = "dit" if name in DITS else "unet"
    state = load_safetensors(run / f"checkpoints/step-6/{learner}.safetensors")
    return {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}


@pytest.mark.training
@each
def test_trained_resumed_saved_and_drawn(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has the average of the last step, and the run goes on bit for bit."""
    run = train(home, name, f"run {name}".replace(" ", "-").replace(",", ""))
    assert len(losses(run)) == 6
    assert losses(run, "val_loss")
    assert (run / "previews/step-0000006.png").is_file()
    drawn = Pipeline.from_pretrained(run / "model")
    weights, expected = drawn.unet.state_dict(), ema(run, name)
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert drawn.unet.config.sample_size == 8
    assert drawn.unet.config.in_channels == 3
    image = draw(drawn)
    drawn.save_pretrained(home / f"{run.name}-copy")
    assert draw(Pipeline.from_pretrained(home / f"{run.name}-copy")) == image

    again = train(home, name, f"{run.name}-again", f"--resume_from={run / 'checkpoints/step-3'}")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ema(again, name).items())

    out = home / f"{run.name}-synthesis"
    main(["ema", str(run), "--length", "0.1", "--out", str(out)])
    draw(Pipeline.from_pretrained(out))


@pytest.mark.processes
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_train_a_dit_as_one(home: Path, sharding: str) -> None:
    """DDP waits for every parameter's gradient, and FSDP splits every block.

    The joint kind, whose last block is unlike the others and gives back text that nobody reads.
    """
    name, run = "dit, joint attention", f"two-{sharding}"
    launch(TWO, "train_unet", *options(home, name, run), f"--sharding={sharding}")
    alone = train(home, name, f"{run}-alone")
    assert losses(home / run) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.training
def test_a_patch_that_does_not_divide_the_latents_is_refused_before_training(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(home, "dit", "refused", "--dit.patch_size=3")
    sentence = "patch_size=3 needs sides divisible by 6 pixels, and the cache has 16x16"
    assert sentence in capsys.readouterr().err


@pytest.mark.training
def test_the_plan_counts_the_dit_that_is_trained(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(home, "dit", "planned")
    count = sum(p.numel() for p in Pipeline.from_pretrained(run / "model").unet.parameters())
    capsys.readouterr()
    main(["plan", "--config", str(run / "config.yaml"), "--device", "l4"])
    printed = capsys.readouterr().out
    assert printed.startswith("dit: batch_size 4")
    assert f"{count / 1e6:,.2f} M" in printed
