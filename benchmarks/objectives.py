"""Which objective trains best? Every prediction x weighting x timestep distribution, alike.

Each run trains a small UNet on latents of the shapes, by the same data, steps, seeds and learning
rate; only the objective differs. On scenes that no run saw it then measures

- the rate: KL(q(z|x) || p(z)) of the latents, bounded by the chain of the noise levels, in bits per
  latent number (`likelihood.bound_terms`): what the held-out latents cost, the same for all types;
- the drawings: their kernel distance (KID) to the held-out images as the VAE decodes them, in
  the features of the image tower, and the share of the shapes asked for whose size, colour and
  kind are found in them (`evaluation.scenes`).

Results are kept one by one in OUT, so that the same command goes on; `objectives_table.py` makes a
table and a figure of them.

    python benchmarks/objectives.py --vae runs/shapes/vae/model --clip runs/shapes/clip/model \\
        --out runs/objectives
"""

import argparse
import json
import time
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import CLIPModel

from latentdiff.data.shapes import shape_scene
from latentdiff.diffusion import Diffusion
from latentdiff.evaluation.kernel import kernel_distance
from latentdiff.evaluation.scenes import count_shapes
from latentdiff.formats.diffusers import find_component
from latentdiff.guidance import guided_denoiser
from latentdiff.images import to_floats, to_pil
from latentdiff.likelihood import bits_per_dim, bound_terms
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, Posterior
from latentdiff.noise import ImageNoise
from latentdiff.samplers import find_sampler
from latentdiff.tasks.denoiser.loss import LossConfig, Uncertainty
from latentdiff.training.ema import EMAConfig
from latentdiff.training.learner import Learner
from latentdiff.training.optimizer import OptimizerConfig
from latentdiff.training.randomness import generator

PREDICTIONS = ("epsilon", "sample", "v_prediction", "score", "flow_prediction")
WEIGHTINGS = ("none", "min_snr", "p2", "uncertainty")
DISTRIBUTIONS = {
    "uniform": LossConfig(),
    "logit_normal": LossConfig(timestep_distribution="logit_normal"),
    "stratified": LossConfig(stratified=True),
}
SIDE, TRAINED, HELD, BATCH = 32, 4000, 128, 32
CHAIN = 40
"""Steps of the bound."""
DRAWING_STEPS, GUIDANCE = 15, 3.0


class Examples(NamedTuple):
    """Latents' moments (N, 2C, H, W), contexts (N, L, D), their captions, the empty context."""

    moments: Tensor
    contexts: Tensor
    captions: list[str]
    empty: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--clip", required=True, type=Path, help="model/ of train_clip.py")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--part", default="0/1", help="0/2 and 1/2 are two processes' halves")
    parser.add_argument("--densities", nargs="+", default=list(DISTRIBUTIONS))
    parser.add_argument("--weightings", nargs="+", default=list(WEIGHTINGS))
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", "the prompt .* tokens and the text encoder reads")
    asked.out.mkdir(parents=True, exist_ok=True)
    vae = VAE.from_pretrained(find_component(asked.vae, "vae"))
    text_encoder = TextEncoder.from_pretrained(find_component(asked.clip, "text_encoder"))
    tower = CLIPModel.from_pretrained(asked.clip / "clip").eval()
    train = examples(vae, text_encoder, seed=0, count=TRAINED)
    held = examples(vae, text_encoder, seed=1, count=HELD)
    index, count = map(int, asked.part.split("/"))
    # Seeds outermost: whatever is done when it is stopped is a table.
    runs = list(product(range(asked.seeds), asked.densities, asked.weightings, PREDICTIONS))
    for seed, distribution, weighting, prediction in runs[index::count]:
        path = asked.out / f"{prediction}-{weighting}-{distribution}-{seed}.json"
        if path.exists():
            continue
        start = time.perf_counter()
        diffusion = Diffusion("linear", prediction)
        objective = replace(DISTRIBUTIONS[distribution], weighting=weighting)
        unet = trained(diffusion, objective, train, steps=asked.steps, seed=seed)
        result = {
            "rate": rate(unet, diffusion, held, seed=seed),
            **quality(unet, diffusion, held, vae, tower, seed=seed),
            "seconds": time.perf_counter() - start,
            "steps": asked.steps,
        }
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(path.stem, {key: round(value, 4) for key, value in result.items()}, flush=True)


@torch.no_grad()
def examples(vae: VAE, text_encoder: TextEncoder, *, seed: int, count: int) -> Examples:
    """The first scenes of a seed that have no combination that is held out for tests."""
    images, captions = [], []
    index = 0
    while len(images) < count:
        scene = shape_scene(seed, index, SIDE)
        index += 1
        if not scene.held_out:
            images.append(torch.tensor(list(scene.image.tobytes()), dtype=torch.uint8))
            captions.append(scene.caption)
    pixels = torch.stack(images).reshape(count, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    moments = [moments_of(vae.encode(to_floats(part))) for part in pixels.split(100)]
    contexts = [text_encoder(captions[start : start + 100]) for start in range(0, count, 100)]
    return Examples(torch.cat(moments), torch.cat(contexts), captions, text_encoder([""]))


def moments_of(posterior: Posterior) -> Tensor:
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def trained(
    diffusion: Diffusion, objective: LossConfig, data: Examples, *, steps: int, seed: int
) -> UNet:
    """The averaged network after `steps` steps of train_unet.py's step."""
    options: dict[str, Any] = {
        "optimizer": OptimizerConfig(
            learning_rate=2e-3, warmup_steps=50, cooldown_steps=steps // 3
        ),
        "max_steps": steps,
    }
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    learner = Learner(network(data), accelerator, ema=EMAConfig(ema_decay=0.99), **options)
    uncertainty = Learner(Uncertainty(), accelerator, **options)
    shape = (BATCH, *Posterior.from_moments(data.moments[:1]).mean.shape[1:])
    for step in range(steps):

        def draw(purpose: str) -> torch.Generator:
            return generator(seed, step, purpose)  # noqa: B023

        rows = torch.randint(len(data.moments), (BATCH,), generator=draw("rows"))
        posterior = Posterior.from_moments(data.moments[rows])
        x0 = posterior.sample(torch.randn(shape, generator=draw("posterior")))
        dropped = torch.rand(BATCH, generator=draw("dropout")) < 0.1
        context = torch.where(dropped[:, None, None], data.empty, data.contexts[rows])
        t = objective.sample_t(diffusion, BATCH, generator=draw("t"))
        noise = objective.noise(shape, generator=draw("noise"))
        with accelerator.autocast():
            losses = diffusion.loss(learner.forward_model, x0, context, noise=noise, t=t)
        weight = objective.weight(diffusion, t).to(losses)
        if objective.weighting == "uncertainty":
            u = uncertainty.forward_model(*diffusion.alpha_sigma(t))
            weight = torch.exp(-u.detach())
            uncertainty.update((losses.detach() * torch.exp(-u) + u).mean())
        learner.update((weight * losses).mean())
    assert isinstance(learner.ema, UNet)
    return learner.ema


def network(data: Examples) -> UNet:
    """A UNet of 0.6 M parameters for these latents and contexts."""
    channels = data.moments.shape[1] // 2
    return UNet(
        UNetConfig(
            sample_size=data.moments.shape[2],
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(24, 48),
            norm_num_groups=8,
            layers_per_block=1,
            cross_attention_dim=data.contexts.shape[2],
            attention_head_dim=(1, 2),
            use_linear_projection=True,
        )
    )


@torch.no_grad()
def rate(unet: UNet, diffusion: Diffusion, data: Examples, *, seed: int) -> float:
    """Bits per latent number: E[log q(z | x) + the bound on -log p(z)]."""
    posterior = Posterior.from_moments(data.moments)
    draw = generator(seed, 0, "rate")
    noise = torch.randn(posterior.mean.shape, generator=draw)
    z = posterior.sample(noise)
    terms = bound_terms(
        guided_denoiser(diffusion, unet, data.contexts, None, 1.0),
        z,
        diffusion.levels(CHAIN),
        variance="small",
        generator=draw,
    )
    bound = terms["prior"] + terms["denoising"].sum(1) + terms["reconstruction"]
    return float(bits_per_dim(bound - posterior.entropy(), z[0].numel()).mean())


@torch.no_grad()
def quality(
    unet: UNet, diffusion: Diffusion, data: Examples, vae: VAE, tower: CLIPModel, *, seed: int
) -> dict[str, float]:
    """KID of the drawings, and how many of the shapes asked for are in them."""
    _, channels, height, width = data.moments.shape
    noise = ImageNoise(
        [1000 * seed + i for i in range(HELD)],
        (channels // 2, height, width),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    denoise = guided_denoiser(diffusion, unet, data.contexts, data.empty, GUIDANCE)
    *_, z = find_sampler("ddim")(denoise, noise(), diffusion.levels(DRAWING_STEPS), noise=noise)
    drawn, true = (
        vae.decode(x).clamp(-1, 1) for x in (z, Posterior.from_moments(data.moments).mean)
    )
    features = [tower.vision_model(pixel_values=x).pooler_output for x in (drawn, true)]
    counts = [
        count_shapes(to_pil(image), caption)
        for image, caption in zip(drawn, data.captions, strict=True)
    ]
    asked, found = map(sum, zip(*counts, strict=True))
    return {"kid": kernel_distance(*features), "shapes": found / asked}


if __name__ == "__main__":
    main()
