"""What each judge says of true images that something was done to: the table of docs/evaluation.md.

    python benchmarks/judges.py --data data/drawings --judge network --judge edges --out DIR

`--vae MODEL` names the model, or the VAE alone, through which the images go once. "Other style" is
no change: a true image is looked up among the images of all styles but its own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.ceiling import mean_psnr, through_vae
from latentdiff.evaluation.controls import blurred, controls
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.looks import find_look
from latentdiff.evaluation.references import References, as_image, read_references
from latentdiff.formats.diffusers import find_component
from latentdiff.images import to_floats, to_pixels
from latentdiff.models.vae import VAE


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--judge", action="append", required=True)
    parser.add_argument("--vae", default="emoji")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    true = read_references(arguments.data, image_size=arguments.image_size)
    wanted = np.random.default_rng(0).permutation(len(true))[: arguments.count].tolist()
    vae = VAE.from_pretrained(find_component(arguments.vae, "vae"))
    drawings = {"VAE": list(through_vae(vae, true, wanted))}
    drawings |= {name: changed(true, wanted, change) for name, change in CHANGES.items()}
    drawings |= {f"control, {name}": made for name, made in controls(true, wanted).items()}
    report: dict[str, dict[str, list[float]]] = {}
    for name in arguments.judge:
        named = find_look(name)
        judge = Judge(named.look, true)
        report[named.description] = rows = {}
        for change, images in drawings.items():
            verdicts = judge(images, wanted)
            right = [verdicts.concept_right, verdicts.style_right]
            rows[change] = [mean_psnr(images, true, wanted).value, *(share(r) for r in right)]
        rows["other style"] = [share(other_style(judge, true, wanted))]
        for change, values in rows.items():
            print(f"{name:10} {change:18}", *(f"{value:8.3f}" for value in values), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (arguments.out / "judges.json").write_text(text + "\n", encoding="utf-8")


def share(right: Tensor) -> float:
    return float(right.float().mean())


def other_style(judge: Judge, true: References, wanted: list[int]) -> Tensor:
    """Whether the nearest image of another style shows the concept, (B,) bool."""
    vectors, shows = judge.vectors, judge.shows
    likeness = vectors[wanted] @ vectors.T
    styles = np.array(true.styles)
    likeness[torch.from_numpy(styles[wanted][:, None] == styles)] = -torch.inf
    return shows[likeness.argmax(dim=1), judge.concepts[wanted]]


def changed(
    true: References, wanted: list[int], change: Callable[[Tensor], Tensor]
) -> list[Image.Image]:
    torch.manual_seed(0)
    return [as_image(image) for image in to_pixels(change(to_floats(true.pixels[wanted])))]


def warped(images: Tensor, matrix: list[list[float]], bend: float = 0.0) -> Tensor:
    """An affine map, and a smooth random bend by about so many of 64 pixels; white comes in."""
    size = list(images.shape)
    grid = F.affine_grid(torch.tensor([matrix]).float().expand(len(images), 2, 3), size, False)
    shifts = torch.randn(len(images), 2, 5, 5) * bend / 32
    shifts = F.interpolate(shifts, size=size[2:], mode="bicubic", align_corners=False)
    grid = grid + shifts.permute(0, 2, 3, 1)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


def recoloured(images: Tensor) -> Tensor:
    """The ink, 1 - x, through a random matrix near the identity for each image."""
    matrices = torch.eye(3) + 0.15 * torch.randn(len(images), 3, 3)
    return 1 - torch.einsum("nij,njhw->nihw", matrices, 1 - images)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "blur 0.7": lambda x: blurred(x, 0.7),
    "blur 1": lambda x: blurred(x, 1),
    "blur 2": lambda x: blurred(x, 2),
    "blur 4": lambda x: blurred(x, 4),
    "shift by 4": lambda x: warped(x, [[1, 0, 8 / 64], [0, 1, -8 / 64]]),
    "15 % smaller": lambda x: warped(x, [[1 / 0.85, 0, 0], [0, 1 / 0.85, 0]]),
    "turned by 10°": lambda x: warped(x, [[0.985, -0.174, 0], [0.174, 0.985, 0]]),
    "bent by 4": lambda x: warped(x, [[1, 0, 0], [0, 1, 0]], bend=4),
    "recoloured": recoloured,
    "noise 0.15": lambda x: x + 0.15 * torch.randn(x.shape),
    "half another": lambda x: (x + x.roll(1, 0)) / 2,
}


if __name__ == "__main__":
    main()
