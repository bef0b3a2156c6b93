"""Does the emoji model know its words? Draw captions it was trained on and look for their pixels.

Each caption is drawn once; the drawing counts as right when, among all pixels of the training
set without skin tones, the nearest in the space of our own CLIP image tower (cosine) is the one
with that caption, or one whose pixels are the same. Writes `words.json` and `grid.png` (48 prompts,
the drawing beside the true image).

    python benchmarks/emoji_words.py --data data/emoji --clip runs/emoji/clip/model/clip --out DIR
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel

from latentdiff import Pipeline
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.images import font_for, to_floats

SKIN_TONES = {"group": ["skin tone", "skin tone and gender"]}


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    pipe = Pipeline.from_pretrained(arguments.model)
    clip = CLIPModel.from_pretrained(arguments.clip).eval()
    side = pipe.vae.config.sample_size
    sets = {
        column: CaptionedImages(
            DataConfig(
                data=str(arguments.data),
                image_size=side,
                caption_columns=(column,),
                exclude=SKIN_TONES,
            )
        )
        for column in ("text", "text_zh")
    }
    pixels = torch.stack([sets["text"].image(i) for i in range(len(sets["text"]))])
    truth = embed(clip, to_floats(pixels))
    report: dict[str, object] = {
        "pixels": len(pixels),
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "sampler": arguments.sampler,
        "decoded": share(truth, decoded(pipe, clip, pixels), pixels, range(len(pixels))),
    }
    cells: list[tuple[str, Image.Image, Image.Image, bool]] = []
    for column, count in (("text", arguments.english), ("text_zh", arguments.chinese)):
        order = np.random.default_rng(0).permutation(len(pixels))[:count]
        captions = [sets[column].captions[i][0] for i in order]
        start = time.perf_counter()
        drawn: list[Image.Image] = []
        for caption in tqdm(captions, desc=column):
            drawn += pipe(
                caption,
                seed=0,
                steps=arguments.steps,
                guidance_scale=arguments.guidance_scale,
                sampler=arguments.sampler,
                progress=False,
            ).images
        tensors = torch.stack(
            [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in drawn]
        )
        right = matches(truth, embed(clip, to_floats(tensors)), pixels, order)
        report[column] = {
            "right": int(right.sum()),
            "of": count,
            "share": float(right.float().mean()),
            "seconds_each": (time.perf_counter() - start) / count,
            "wrong": [caption for caption, ok in zip(captions, right, strict=True) if not ok],
        }
        cells += [
            (caption, image, Image.fromarray(pixels[i].permute(1, 2, 0).numpy()), bool(ok))
            for caption, image, i, ok in zip(captions, drawn, order, right, strict=True)
        ][: 32 if column == "text" else 16]
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (arguments.out / "words.json").write_text(text + "\n", encoding="utf-8")
    grid(cells).save(arguments.out / "grid.png")
    print({key: value for key, value in report.items() if key not in ("text", "text_zh")})
    for column in ("text", "text_zh"):
        print(column, {k: v for k, v in report[column].items() if k != "wrong"})  # pyright: ignore


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--english", type=int, default=200)
    parser.add_argument("--chinese", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--sampler", default="ddim")
    return parser.parse_args()


@torch.no_grad()
def embed(clip: CLIPModel, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] -> unit vectors (B, D)."""
    vectors = [
        clip.visual_projection(clip.vision_model(pixel_values=part).pooler_output)
        for part in images.split(64)
    ]
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


@torch.no_grad()
def decoded(pipe: Pipeline, clip: CLIPModel, pixels: Tensor) -> Tensor:
    """What the VAE alone does to the images: the most that any UNet could reach."""
    parts = [
        embed(clip, pipe.vae.decode(pipe.vae.encode(to_floats(part)).mean).clamp(-1, 1))
        for part in pixels.split(64)
    ]
    return torch.cat(parts)


def matches(truth: Tensor, vectors: Tensor, pixels: Tensor, wanted: np.ndarray | range) -> Tensor:
    """Whether each vector's nearest image is the wanted one or has its pixels: (B,) bool."""
    nearest = (vectors @ truth.T).argmax(dim=1)
    return (pixels[nearest] == pixels[list(wanted)]).flatten(1).all(dim=1)


def share(truth: Tensor, vectors: Tensor, pixels: Tensor, wanted: range) -> float:
    return float(matches(truth, vectors, pixels, wanted).float().mean())


def grid(cells: list[tuple[str, Image.Image, Image.Image, bool]]) -> Image.Image:
    """Eight cells a row: the drawing, the true image, the caption; a red frame where wrong."""
    columns, side, gap, label = 8, 64, 6, 18
    width, height = 2 * side + 3 * gap, side + label + 2 * gap
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, image, true, ok) in enumerate(cells):
        x, y = i % columns * width + gap, i // columns * height + gap
        sheet.paste(image.resize((side, side)), (x, y))
        sheet.paste(true.resize((side, side)), (x + side + gap, y))
        if not ok:
            draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline="red", width=2)
        font = font_for(caption, 11)
        while font is not None and draw.textlength(caption, font) > width - gap:
            caption = caption[:-2] + "…"
        if font is not None:
            draw.text((x, y + side + 3), caption, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main()
