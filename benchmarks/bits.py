"""Bits per dimension of a whole model on images that it never saw, term by term.

The bound is that of `likelihood.composed_bound_terms`: the pixels given the latents, and the
latents' KL to what the diffusion model finds probable. The decoder's p(x | z) is a Gaussian of one
variance in 8-bit bins, and that variance is fitted to training images. Writes a Markdown table to
standard output and everything to OUT as JSON.

    python benchmarks/bits.py --data data/drawings --out runs/bits.json
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff import Pipeline
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.guidance import guided_denoiser
from latentdiff.images import to_floats
from latentdiff.levels import Denoise
from latentdiff.likelihood import bits_per_dim, composed_bound_terms, flow_log_density
from latentdiff.training.randomness import generator

LABELS = {
    "pixels": "pixels given the latents, E[-log p(x given z)]",
    "code": "latents' own entropy, E[log q(z given x)]",
    "prior": "end of the chain, KL(q(z_T given z) to N(0, I))",
    "denoising": "denoising, sum of the KL of steps t > 1",
    "reconstruction": "last step, E[-log p(z given z_1)]",
    "total": "bound on -log p(x)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--flow_steps", type=int, default=40)
    parser.add_argument("--flow_count", type=int, default=16)
    parser.add_argument("--out", required=True, type=Path)
    asked = parser.parse_args()
    pipe = Pipeline.from_pretrained(asked.model, device="cpu")
    side = pipe.vae.config.sample_size
    fitted, _ = load_images(asked.data, "train", side, asked.count)
    images, captions = load_images(asked.data, asked.split, side, asked.count)
    with torch.no_grad():
        variance = torch.cat(
            [
                (pipe.vae.decode(pipe.vae.encode(part).mean) - part).square().flatten()
                for part in fitted.split(32)
            ]
        ).mean()
    report: dict[str, object] = {
        "images": len(images),
        "split": asked.split,
        "deviation": float(variance.sqrt()),
    }
    for name, words in (("captions", captions), ("no captions", [""] * len(captions))):
        for steps in asked.steps if name == "captions" else asked.steps[-1:]:
            start = time.perf_counter()
            terms = bound(pipe, images, words, variance, steps)
            found = {
                key: [float(value.mean()), float(value.std() / len(value) ** 0.5)]
                for key, value in terms.items()
            }
            report[f"{name}, {steps} steps"] = found | {"seconds": time.perf_counter() - start}
            print(f"\n{name}, {steps} steps: bits per dimension, standard error of the mean")
            for key, (mean, error) in found.items():
                print(f"| {LABELS[key]} | {mean:.4f} | {error:.4f} |", flush=True)
    few = images[: asked.flow_count]
    report["flow"] = flow(pipe, few, captions[: asked.flow_count], asked.flow_steps)
    print("\nlatents along the probability flow, bits per latent number:", report["flow"])
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def load_images(data: Path, split: str, side: int, count: int) -> tuple[Tensor, list[str]]:
    """Images (N, 3, side, side), evenly from the whole split, and a caption of each."""
    dataset = CaptionedImages(DataConfig(data=str(data), split=split, image_size=side))
    rows = [i * len(dataset) // count for i in range(min(count, len(dataset)))]
    images = torch.stack([dataset.image(i) for i in rows])
    return to_floats(images), [dataset.captions[i][0] for i in rows]


def bound(
    pipe: Pipeline, images: Tensor, captions: list[str], variance: Tensor, steps: int
) -> dict[str, Tensor]:
    """Every term in bits per pixel dimension, (N,), and their sum."""
    levels = pipe.diffusion.levels(steps)
    parts: list[dict[str, Tensor]] = []
    rows = range(0, len(images), 16)
    for start in tqdm(rows, desc=f"{steps} steps", leave=False):
        x, words = images[start : start + 16], captions[start : start + 16]
        with torch.no_grad():
            terms = composed_bound_terms(
                x,
                pipe.vae.encode(x),
                pipe.vae.decode,
                denoiser(pipe, words),
                levels,
                log_variance=variance.log(),
                generator=generator(0, start, "bound"),
            )
        terms["denoising"] = terms["denoising"].sum(1)
        parts.append({key: bits_per_dim(value, x[0].numel()) for key, value in terms.items()})
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return joined | {"total": torch.stack(list(joined.values())).sum(0)}


def denoiser(pipe: Pipeline, captions: list[str]) -> Denoise:
    with torch.no_grad():
        context = torch.cat([pipe.encode([caption]) for caption in captions])
    network: Callable[[Tensor, Tensor, Tensor], Tensor] = pipe.unet
    return guided_denoiser(pipe.diffusion, network, context, None, 1.0)


def flow(pipe: Pipeline, images: Tensor, captions: list[str], steps: int) -> dict[str, float]:
    """-log p(z), and KL(q(z given x) to p(z)), of the latents: mean bits per latent number."""
    levels = pipe.diffusion.levels(steps)
    pipe.unet.requires_grad_(False)
    bits: list[Tensor] = []
    rates: list[Tensor] = []
    for start in tqdm(range(0, len(images), 16), desc="flow", leave=False):
        draw = generator(0, start, "flow")
        with torch.no_grad():
            posterior = pipe.vae.encode(images[start : start + 16])
        z = posterior.sample(torch.randn(posterior.mean.shape, generator=draw))
        # The density is that of latents with the least noise of the levels: so much is added.
        least = levels[len(levels) - 1]
        noisy = least.alpha * z + least.sigma * torch.randn(z.shape, generator=draw)
        denoise = denoiser(pipe, captions[start : start + 16])
        nats = -flow_log_density(denoise, noisy.float(), levels, generator=draw)
        size = z[0].numel()
        bits.append(bits_per_dim(nats, size))
        rates.append(bits_per_dim(nats - posterior.entropy(), size))
    return {
        "least noise": float(levels[len(levels) - 1].sigma),
        "bits": float(torch.cat(bits).mean()),
        "rate": float(torch.cat(rates).mean()),
        "standard error": float(torch.cat(rates).std() / len(images) ** 0.5),
    }


if __name__ == "__main__":
    main()
