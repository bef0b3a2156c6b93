"""How far from the exact sample is a sampler after so many evaluations of the network?

All samplers here walk the same differential equation from the same noise, so with ever more steps
they meet. The error of N steps is the distance of its latents from those of 1,000 steps of the
same sampler, relative to their size: the median of eight prompts, since a model that knows its
images by heart draws one or another of them, and a sample near the border may go either way. Writes
`sampler_error.json` and `sampler_error.png`.

    python benchmarks/sampler_error.py --out DIR
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from latentdiff import Pipeline
from latentdiff.guidance import guided_denoiser
from latentdiff.noise import ImageNoise
from latentdiff.samplers import find_sampler

SAMPLERS = {"ddim": "DDIM", "dpmpp_2m": "DPM++ 2M", "unipc": "UniPC"}
STEPS = (5, 8, 10, 15, 20, 30, 50, 100, 200)
REFERENCE = 1000
PROMPTS = [
    *("a cat, 3D style", "red heart, flat style", "grinning face, shaded style", "flat pizza"),
    *("sunflower, bold style", "a rocket, black and white", "猫，渐变风格", "西瓜，立体风格"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model, device="cpu")

    samples = {
        name: {n: sample(pipe, name, n, arguments.guidance_scale) for n in tqdm(counts, desc=name)}
        for name, counts in dict.fromkeys(SAMPLERS, (*STEPS, REFERENCE)).items()
    }
    errors = {
        name: {n: distance(by_steps[n], by_steps[REFERENCE]) for n in STEPS}
        for name, by_steps in samples.items()
    }
    apart = {
        name: distance(by_steps[REFERENCE], samples["dpmpp_2m"][REFERENCE])
        for name, by_steps in samples.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {
        "model": arguments.model,
        "guidance_scale": arguments.guidance_scale,
        "prompts": PROMPTS,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "error": errors,
        "references_apart_from_dpmpp_2m": apart,
    }
    (arguments.out / "sampler_error.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(errors, arguments.guidance_scale, arguments.out / "sampler_error.png")
    for name, by_steps in errors.items():
        print(f"{name:9}", " ".join(f"{n}: {error:.2e}" for n, error in by_steps.items()))
    print("references apart", apart)


@torch.no_grad()
def sample(pipe: Pipeline, name: str, steps: int, guidance_scale: float) -> Tensor:
    """Latents (B, C, H, W) of all prompts, with seeds 0, 1, …"""
    sampler = find_sampler(name)
    context, null_context = pipe.encode(PROMPTS), pipe.encode([""])
    denoise = guided_denoiser(pipe.diffusion, pipe.unet, context, null_context, guidance_scale)
    side = pipe.unet.config.sample_size or pipe.vae.config.sample_size // pipe.vae.config.factor
    noise = ImageNoise(
        range(len(PROMPTS)),
        (pipe.vae.config.latent_channels, side, side),
        device=pipe.device,
        dtype=torch.float32,
    )
    *_, latents = sampler(denoise, noise(), sampler.levels(pipe.diffusion, steps), noise=noise)
    return latents


def distance(ours: Tensor, reference: Tensor) -> float:
    """The median over the images of a batch."""
    apart, size = ((x.flatten(1).norm(dim=1)) for x in (ours - reference, reference))
    return float((apart / size).median())


def plot(errors: dict[str, dict[int, float]], guidance_scale: float, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, by_steps in errors.items():
        axes.loglog(list(by_steps), list(by_steps.values()), marker="o", label=SAMPLERS[name])
    axes.axvline(20, color="0.8", linewidth=1, zorder=0)
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.minorticks_off()
    axes.set_xlabel("evaluations of the network (one a step)")
    axes.set_ylabel(f"relative error against {REFERENCE:,} steps")
    axes.set_title(f"The embedded emoji model, guidance {guidance_scale:g}")
    axes.grid(True, which="major", color="0.93")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
