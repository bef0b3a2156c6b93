"""Training that starts from a model: one step is that of diffusers' scripts, for whole UNets and
LoRAs; what is killed goes on bit for bit; what does not fit is one sentence."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from support.scripts import ROOT, TWO, launch, run_here, script
from support.settings import HALF
from support.tiny import CONTEXT_DIM, UNET, Recording, randomise, tiny_pipeline
from test_cache import write_images
from test_interchange import decibels, first_noise
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.diffusion import Diffusion
from latentdiff.formats.weights import load_safetensors
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE
from latentdiff.pipeline import Pipeline
from latentdiff.tasks.denoiser.task import DenoiserTask
from latentdiff.training.randomness import MicroBatch

pytestmark = pytest.mark.training

LIKE = {
    "sd1": (
        replace(UNET, attention_head_dim=2),
        Diffusion("scaled_linear", "epsilon", timestep_spacing="leading", set_alpha_to_one=False),
    ),
    "sd2": (
        replace(UNET, attention_head_dim=(2, 4), use_linear_projection=True),
        Diffusion("scaled_linear", "v_prediction", rescale_betas_zero_snr=True),
    ),
}
"""Small models of the two kinds, the second with zero terminal SNR."""
DIT = DiTConfig(
    sample_size=8,
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=CONTEXT_DIM,
)
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The two models, a DiT, a VAE of other latents, and images with captions."""
    home = tmp_path_factory.mktemp("home")
    for name, (unet, diffusion) in LIKE.items():
        pipeline = tiny_pipeline(home / "scratch", diffusion)
        torch.manual_seed(1)
        network = UNet(unet)
        randomise(network)
        Pipeline(
            unet=network.eval(),
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            diffusion=diffusion,
        ).save_pretrained(home / name)
    torch.manual_seed(2)
    dit = Pipeline(
        unet=DiT(DIT),
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        diffusion=pipeline.diffusion,
    )
    dit.save_pretrained(home / "dit")
    VAE(replace(pipeline.vae.config, latent_channels=3)).save_pretrained(home / "vae")
    write_images(home / "data", 12)
    (home / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
        yield home


def arguments(home: Path, out: Path, name: str = "sd1", **options: Any) -> list[str]:
    """Of train_unet.py on the images; `options` are added, and None leaves a default out."""
    settings = {
        "init": home / name,
        "data": home / "data",
        "image_size": 16,
        "upscale_limit": 4,
        "output_dir": out,
        "batch_size": 4,
        "max_steps": 4,
        "checkpoint_every": 2,
        "val_fraction": 0,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "cooldown_steps": 0,
        "mixed_precision": "no",
        "beta2": 0.999,
    } | options
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]


def prepared(
    monkeypatch: pytest.MonkeyPatch, args: list[str], dtype: torch.dtype = torch.float64
) -> tuple[Any, dict[str, Any]]:
    """The task that train_unet.py makes, and its first batch, converted to float64."""
    found: list[Any] = []

    def keep(task: Any, loader: Any, run: Any) -> None:
        found.extend((task, next(loader(0))))
        run.folder.close()

    monkeypatch.setattr(script("train_unet"), "fit", keep)
    run_here("train_unet", *args)
    task, batch = found
    for network in (task.learner.model, task.text_encoder):
        network.to(dtype)
    task.learner._averages = None  # they are in float32
    batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}
    if task.captions.states is not None:
        task.captions.states = task.captions.states.to(dtype)
    return task, batch


def their_step(
    folder: Path, unet: nn.Module, task: Any, batch: dict[str, Any], trained: list[nn.Parameter]
) -> Tensor:
    """train_text_to_image.py's and train_text_to_image_lora.py's step of diffusers 0.38, with the
    latents, the noise and the times of ours; returns the loss."""
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    # Theirs are in float32, whose rounding AdamW makes 1.3e-6 of where a gradient is 1e-8.
    exact = task.diffusion.alphas_cumprod
    assert torch.allclose(scheduler.alphas_cumprod.double(), exact, atol=1e-6)
    scheduler.alphas_cumprod = exact
    mean, logvar = batch["moments"].chunk(2, dim=1)  # of the scaled latents
    latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * batch["posterior"]
    timesteps = batch["t"] - 1
    noisy = scheduler.add_noise(latents, batch["noise"], timesteps)
    context = task.captions.context(batch["caption"])
    if scheduler.config.prediction_type == "epsilon":
        target = batch["noise"]
    else:
        target = scheduler.get_velocity(latents, batch["noise"], timesteps)
    prediction = unet(noisy, timesteps, context, return_dict=False)[0]
    loss = F.mse_loss(prediction, target, reduction="mean")
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("name", LIKE)
def test_a_step_of_the_whole_unet_is_that_of_diffusers(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    task, batch = prepared(monkeypatch, arguments(home, tmp_path / "run", name))
    theirs = UNet2DConditionModel.from_pretrained(home / name / "unet").double().train()
    before = copy.deepcopy(theirs.state_dict())
    loss = task.step(batch, 0, MicroBatch())["loss"].detach()
    their_loss = their_step(home / name, theirs, task, batch, list(theirs.parameters()))
    assert float(loss) == pytest.approx(float(their_loss), abs=1e-6)
    ours, expected = task.learner.model.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    moved = max(float((expected[key] - before[key]).abs().max()) for key in expected)
    assert moved == pytest.approx(1e-4, rel=0.05)
    assert max(float((ours[key] - expected[key]).abs().max()) for key in expected) < 1e-6


@pytest.mark.parametrize("name", LIKE)
def test_a_step_of_a_lora_is_that_of_diffusers(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = {"lora.rank": 4, "lora.alpha": 8, "lora.layers": "[attention]"}
    task, batch = prepared(monkeypatch, arguments(home, tmp_path / "run", name, **options))
    theirs = UNet2DConditionModel.from_pretrained(home / name / "unet")
    theirs.requires_grad_(False)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    theirs.double().train()
    trained = {n.replace("default", "trained"): p for n, p in theirs.named_parameters()}
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    assert trained.keys() == task.learner.trained.keys()
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(task.learner.trained[key])
    loss = task.step(batch, 0, MicroBatch())["loss"].detach()
    their_loss = their_step(home / name, theirs, task, batch, list(trained.values()))
    assert float(loss) == pytest.approx(float(their_loss), abs=1e-6)
    for key, parameter in trained.items():
        assert torch.allclose(task.learner.trained[key], parameter, rtol=0, atol=1e-6), key
    assert any(
        float(p.detach().abs().max()) > 9e-5 for key, p in trained.items() if "lora_B" in key
    )


LORA = {"lora.rank": 4, "lora.alpha": 2, "lora.dropout": 0.2, "lora.text_encoder": "true"}
RUNS = {"unet": {}, "lora": LORA}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_killed_goes_on_bit_for_bit(home: Path, tmp_path: Path, name: str) -> None:
    """SIGKILL after the first checkpoint, and the same command again; dropout is on."""
    options = RUNS[name] | {"max_steps": 6, "ema_decay": 0.5, "mixed_precision": HALF}
    run_here("train_unet", *arguments(home, tmp_path / "whole", **options))
    args = arguments(home, tmp_path / "killed", **options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, ROOT / "train/train_unet.py", *args], env=environment
    )
    first = tmp_path / "killed/checkpoints/step-2/manifest.json"
    while not first.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_here("train_unet", *args)
    for part in ("model", "checkpoints/step-6"):
        whole, killed = tmp_path / "whole" / part, tmp_path / "killed" / part
        files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
        assert files
        for file in files:
            assert tensors(whole / file) == tensors(killed / file)


def tensors(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a file; its metadata names the run."""
    found = load_safetensors(path)
    return {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in found.items()}


def drawn(pipeline: Pipeline) -> Tensor:
    """An image before it is rounded to bytes, (H, W, 3) in [0, 1]."""
    pipeline = Recording(**pipeline.components._asdict())
    pipeline("a cat", seed=3, steps=4, guidance_scale=2.0, progress=False)
    with torch.no_grad():
        return (pipeline.vae.decode(pipeline.latents)[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_a_trained_file_is_drawn_alike_by_ours_and_diffusers(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    """Of UNet and text encoder, by both kinds of names: the image is that of the run, ≥ 60 dB."""
    options = LORA | {"learning_rate": 0.05, "lora.names": names, "ema_decay": 0.0}
    found: list[Any] = []
    save = DenoiserTask.save
    monkeypatch.setattr(DenoiserTask, "save", lambda self, f: found.append(self) or save(self, f))
    run_here("train_unet", *arguments(home, tmp_path / "run", **options))
    ours, trained = Pipeline.from_pretrained(home / "sd1"), found[-1].pipeline
    base = drawn(ours)
    ours.loras.load(tmp_path / "run/model/lora.safetensors")
    images = {"run": drawn(trained), "loaded": drawn(ours)}
    theirs = StableDiffusionPipeline.from_pretrained(home / "sd1")
    theirs.load_lora_weights(tmp_path / "run/model")
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    size = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    noise = first_noise(3, 4, 8, 8)
    images["diffusers"] = torch.tensor(theirs("a cat", latents=noise, **size).images[0])
    ours.loras.fuse()
    images["fused"] = drawn(ours)
    for name, image in images.items():
        assert decibels(image, images["loaded"]) > 60 or name == "run"
    assert decibels(images["run"], images["loaded"]) > 40  # the file is in float16
    assert decibels(base, images["loaded"]) < 30


def test_a_run_s_model_is_a_start_too_and_its_average_begins_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other data, another learning rate and another objective, on top of a run and of a DiT."""
    new = {"diffusion.schedule": "flow", "diffusion.prediction": "flow_prediction"}
    run_here("train_unet", *arguments(home, tmp_path / "dit", "dit", max_steps=1, **new))
    dit = Pipeline.from_pretrained(tmp_path / "dit/model")
    assert dit.unet.config == DIT
    assert dit.diffusion == Diffusion("flow", "flow_prediction")

    run_here("train_unet", *arguments(home, tmp_path / "first", max_steps=1))
    first = Pipeline.from_pretrained(tmp_path / "first/model")
    args = arguments(home, tmp_path / "second", init=tmp_path / "first/model", image_size=32)
    task, _ = prepared(monkeypatch, args, torch.float32)
    assert task.diffusion == first.diffusion
    for name, weight in task.ema.state_dict().items():
        assert torch.equal(weight, first.unet.state_dict()[name])
    assert task.pipeline.side == 32


@pytest.mark.processes
def test_two_processes_train_the_lora_that_one_trains(home: Path, tmp_path: Path) -> None:
    """Of the UNet and the text encoder; gradients are averaged, which rounds otherwise."""
    options = LORA | {"lora.dropout": 0.0}
    run_here("train_unet", *arguments(home, tmp_path / "one", **options))
    launch(TWO, "train_unet", *arguments(home, tmp_path / "two", **options))
    one, two = (load_safetensors(tmp_path / n / "model/lora.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    largest = max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_up" in name)
    assert largest > 1e-4
    for name, tensor in one.items():
        assert torch.allclose(tensor.float(), two[name].float(), atol=0.03 * largest), name


def test_a_lora_goes_on_with_other_data_and_another_learning_rate(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins at the file's weights, ranks and alphas, and one of another kind is refused."""
    run_here("train_unet", *arguments(home, tmp_path / "first", **LORA))
    first = load_safetensors(tmp_path / "first/model/lora.safetensors")
    go_on = {"lora.weights": tmp_path / "first/model", "batch_size": 2, "learning_rate": 1e-9}
    run_here("train_unet", *arguments(home, tmp_path / "second", **go_on))
    second = load_safetensors(tmp_path / "second/model/lora.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor.float(), second[name].float(), rtol=2e-3, atol=1e-7), name


WRONG = [
    ({"lora.weights": "{home}/sd1", "lora.rank": 3}, "lora.rank=3 has no effect with lora.weights"),
    ({"lora.weights": "{home}/nowhere"}, "lora.weights: {home}/nowhere"),
    ({"sharding": "full", "lora.rank": 2}, "sharding=full must be none with lora"),
    ({"lora.rank": 17}, "lora.rank=17 must be at most 16, the rank of "),
    ({"lora.layers": "[]"}, "lora.layers=[] must name layers"),
    ({"init": "{home}/data"}, "{home}/data is not a whole pipeline folder; missing: model_index"),
    ({"init": "{home}/nowhere"}, "init: model='{home}/nowhere' is neither a file, a folder nor"),
    ({"data": "{home}/empty"}, "{home}/empty"),
    ({"vae": "{home}/vae"}, "init={home}/sd1 has 4 and 2: leave vae out"),
    ({"init": "{home}/dit", "lora.rank": 4}, "lora needs a UNet, and init={home}/dit has a DiT"),
    ({"text_encoder": "emoji"}, "cross_attention_dim=16 of the UNet must be "),
    ({"vlb_weight": 2.0}, "vlb_weight=2.0 has no effect"),
    ({"diffusion.prediction": "epsilon"}, "diffusion.schedule must be given as well"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG)
def test_what_does_not_fit_is_one_sentence(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    sentence: str,
) -> None:
    filled = {n: v.format(home=home) if isinstance(v, str) else v for n, v in options.items()}
    with pytest.raises(SystemExit) as caught:
        run_here("train_unet", *arguments(home, tmp_path / "run", **filled))
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert sentence.format(home=home) in line


def test_another_base_is_refused_when_a_run_goes_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA's checkpoint holds nothing of its base, which could be another one of the shape."""
    model = tmp_path / "model"
    shutil.copytree(home / "sd1", model)
    args = arguments(home, tmp_path / "run", init=model, max_steps=2, **LORA)
    run_here("train_unet", *args)
    unet = UNet(LIKE["sd1"][0])
    randomise(unet)
    unet.save_pretrained(model / "unet")
    with pytest.raises(SystemExit):
        run_here("train_unet", *args, "--max_steps=4")
    assert "init" in capsys.readouterr().err.splitlines()[-1]
