"""Train a tokenizer and both CLIP towers from scratch: accelerate launch train/train_clip.py."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from open_clip import ClipLoss
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel
from transformers.utils import logging

from latentdiff.data.batches import check_batch
from latentdiff.data.config import DataConfig
from latentdiff.data.images import CaptionedImages
from latentdiff.data.opening import image_batches, open_images, some_captions, some_examples
from latentdiff.data.summary import images_summary
from latentdiff.models.clip import CLIPSize, new_clip
from latentdiff.models.text import TextEncoder
from latentdiff.pictures import picture_grid, to_floats, to_pil
from latentdiff.training.config import parse_config, run_script
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.loop import fit
from latentdiff.training.meter import Metrics
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import Share, choose, generator
from latentdiff.training.run_folder import RunFolder
from latentdiff.training.setup import LoopConfig, make_accelerator
from latentdiff.training.tokenizer import train_tokenizer

MOST_CAPTIONED = 200_000  # pictures of a stream whose captions the tokenizer learns from
MAX_LOGIT_SCALE = math.log(100)  # CLIP, section 2.5: clipped to keep training stable


@dataclass(frozen=True)
class TrainCLIP(DataConfig, LoopConfig, OptimizerConfig):
    """Train a tokenizer on the captions, then text and image tower contrastively on the pairs."""

    output_dir: Path = Path("runs/shapes/clip")
    max_steps: int = 600
    batch_size: int = 128
    learning_rate: float = 1e-3
    cooldown_steps: int = 200
    clip: CLIPSize = field(default_factory=CLIPSize)
    vocab_size: int = 3072
    """Tokens at most, of them 514 fixed: bytes, start and end."""
    max_tokens: int = 24
    """Tokens of a prompt, start and end among them; what is longer is cut off with a warning."""
    crop_scale: float = 0.8
    """Training sees random squares whose side is this share of the picture's, or more."""
    blur: float = 0.0
    """And each blurred by up to so many pixels: a tower that is to judge an autoencoder's or a
    UNet's pictures must not live on their finest details."""
    noise: float = 0.0
    """And with Gaussian noise of up to this deviation; pictures are in [-1, 1]."""

    def __post_init__(self) -> None:
        for part in (DataConfig, LoopConfig, OptimizerConfig):
            part.__post_init__(self)
        if self.sharding != "none":
            raise ValueError(
                f"sharding={self.sharding!r} must be 'none': CLIP's temperature is one number, "
                "which cannot be split, and is kept below a limit after each step"
            )
        if self.accumulation != 1:
            raise ValueError(
                f"accumulation={self.accumulation} must be 1: the contrastive loss compares each "
                "picture with every caption of the batch, so that parts of it have another loss"
            )
        for name in ("blur", "noise"):
            if not 0 <= getattr(self, name) <= 8:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 8")
        if not self.caption_columns:
            raise ValueError("caption_columns is empty: CLIP is trained on pictures with captions")


def main() -> None:
    config, settings = parse_config(TrainCLIP)
    logging.disable_progress_bar()  # transformers' would break into ours
    accelerator = make_accelerator(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    processes = Processes(accelerator, timeout=config.timeout)
    run = RunFolder(config.output_dir, settings, processes)
    dataset = processes.in_turn(lambda: open_images(config))
    if isinstance(dataset, CaptionedImages):  # a stream tells when its first epoch ends
        check_batch(config.batch_size, len(dataset))
    tokenizer = train_tokenizer(
        some_captions(dataset, MOST_CAPTIONED),
        vocab_size=config.vocab_size,
        length=config.max_tokens,
    )
    torch.manual_seed(config.seed)
    learner = Learner(
        new_clip(config.clip, tokenizer, image_size=config.image_size), config, accelerator
    )
    raw, ema = learner.raw, learner.ema
    assert isinstance(raw, CLIPModel)
    assert isinstance(ema, CLIPModel)
    if accelerator.device.type == "cpu":
        # torch's fused attention is slower than plain products there, see models/layers.py.
        raw.set_attn_implementation("eager")
    contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

    def tokenize(prompts: list[str]) -> Tensor:
        """(B, L) token ids; training captions may be cut, so here nobody is warned."""
        encoded = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return encoded.input_ids.to(accelerator.device)

    def step(batch: dict[str, Any], number: int, share: Share) -> Metrics:
        def draw(purpose: str, *shape: int) -> Tensor:
            """This process's rows of a global batch that is uniform in [0, 1), (B, *shape)."""
            source = generator(config.seed, number, purpose)
            return share.rows(torch.rand(config.batch_size, *shape, generator=source))

        def gaussian(purpose: str, *shape: int) -> Tensor:
            """This process's rows of a global batch of N(0, I), (B, *shape)."""
            source = generator(config.seed, number, purpose)
            return share.rows(torch.randn(config.batch_size, *shape, generator=source))

        images = to_floats(batch["images"].to(accelerator.device))
        images = crop(images, draw("crop", 3).to(images), scale=config.crop_scale)
        if config.blur > 0:
            images = blur(images, config.blur * draw("blur").to(images))
        if config.noise > 0:
            strength = config.noise * draw("noise strength", 1, 1, 1).to(images)
            images = images + strength * gaussian("noise", *images.shape[1:]).to(images)
        words = choose(batch["captions"], draw("caption").tolist())
        output = learner.model(input_ids=tokenize(words), pixel_values=images)
        image, text = output.image_embeds, output.text_embeds  # (B, D), of length 1
        loss = contrastive(image, text, raw.logit_scale.exp())
        with torch.no_grad():
            own = torch.arange(len(image), device=image.device) + rank * len(image)
            texts = accelerator.gather(text)
            assert isinstance(texts, Tensor)
            accuracy = (image @ texts.T).argmax(dim=1).eq(own).float().mean()
        grad_norm = learner.update(loss, share)
        raw.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        return {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm}

    def data(start: int) -> Iterator[dict[str, Any]]:
        return image_batches(
            dataset,
            start,
            batch_size=config.batch_size,
            seed=config.seed,
            stop=config.max_steps,
            rank=rank,
            world_size=world_size,
        )

    @torch.no_grad()
    def preview(path: Path) -> None:
        """A row for each of eight captions: the true picture, then the seven nearest of 1,024."""
        examples = list(some_examples(dataset, 1024))
        count = len(examples)
        images = torch.stack([example["image"] for example in examples])
        pixels = to_floats(images.to(accelerator.device))
        asked = [i * count // 8 for i in range(8)]
        words = tokenize([examples[i]["captions"][0] for i in asked])
        output = ema(input_ids=words, pixel_values=pixels)
        nearest = (output.text_embeds @ output.image_embeds.T).topk(min(7, count)).indices
        rows = [[i, *row.tolist()] for i, row in zip(asked, nearest, strict=True)]
        shown = [to_pil(pixels[i]) for row in rows for i in row]
        picture_grid(shown, columns=1 + nearest.shape[1]).save(path)

    def save(folder: Path) -> None:
        """`text_encoder/` and `tokenizer/` for the UNet; `clip/`, both towers, for evaluation."""
        assert isinstance(ema.config.text_config, CLIPTextConfig)
        tower = CLIPTextModel(ema.config.text_config)
        names = tower.state_dict().keys()
        weights = {name.removeprefix("text_model."): v for name, v in ema.state_dict().items()}
        tower.load_state_dict({name: weights[name.removeprefix("text_model.")] for name in names})
        TextEncoder(tower, tokenizer).save_pretrained(folder)
        ema.save_pretrained(folder / "clip")
        side = {"height": config.image_size, "width": config.image_size}
        CLIPImageProcessor(
            size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(folder / "clip")

    fit(
        step,
        data,
        {"clip": learner},
        config,
        accelerator,
        run,
        save=save,
        preview=preview,
        fingerprints={"data": dataset.fingerprint},
        summary=images_summary(dataset),
    )


def crop(images: Tensor, places: Tensor, *, scale: float) -> Tensor:
    """Cut random squares and enlarge them to the picture's size (open_clip trains on such).

    `places` (B, 3) is uniform in [0, 1): side, from `scale` to 1, and where it lies in x and y.
    """
    side = scale + (1 - scale) * places[:, 0]
    shift = (2 * places[:, 1:] - 1) * (1 - side[:, None])  # keeps the square inside
    maps = torch.zeros(len(images), 2, 3, device=images.device)
    maps[:, 0, 0] = maps[:, 1, 1] = side
    maps[:, :, 2] = shift
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each picture (B, C, H, W) by a Gaussian of its own deviation, (B,) in pixels."""
    reach = max(1, math.ceil(3 * float(sigma.max())))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)  # (B, K)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    channels = images.shape[1]
    rows = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    weights = kernels.repeat_interleave(channels, dim=0)  # one for each picture and channel
    x = rearrange(rows, "b c h w -> 1 (b c) h w")
    x = F.conv2d(x, weights[:, None, None, :], groups=len(weights))
    x = F.conv2d(x, weights[:, None, :, None], groups=len(weights))
    return rearrange(x, "1 (b c) h w -> b c h w", c=channels)


if __name__ == "__main__":
    run_script(main)
