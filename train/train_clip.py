"""Train a tokenizer and both CLIP towers, or train on: accelerate launch train/train_clip.py."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from open_clip import ClipLoss
from open_clip.loss import SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)
from transformers.utils import logging

from latentdiff.data.batches import check_batch
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.opening import image_batches, open_images, some_captions, some_examples
from latentdiff.data.stream import StreamedImages
from latentdiff.data.summary import images_summary
from latentdiff.images import image_grid, to_floats, to_pil
from latentdiff.models.clip import CLIPSize, new_clip
from latentdiff.models.clip_start import Pixels, load_start
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.text import TextEncoder, save_tokenizer
from latentdiff.training.config import parse_config, run_script
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.loop import fit
from latentdiff.training.meter import Metrics
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import Share, choose, generator
from latentdiff.training.retrieval import Pool
from latentdiff.training.run_folder import RunFolder
from latentdiff.training.setup import LoopConfig, make_accelerator
from latentdiff.training.tokenizer import train_tokenizer
from latentdiff.training.validation import Rest, held_out

MOST_CAPTIONED = 200_000  # images of a stream whose captions the tokenizer learns from
MAX_LOGIT_SCALE = math.log(100)  # CLIP, section 2.5: clipped to keep training stable
# SigLIP (Zhai et al. 2023, section 3.2): so that the many wrong pairs do not overwhelm at first.
SIGMOID_SCALE, SIGMOID_BIAS = math.log(10), -10.0
POOL_BATCH = 64  # held-out images at a time, the same in every run, as sums are not


@dataclass(frozen=True)
class TrainCLIP(DataConfig, LoopConfig, OptimizerConfig):
    """Train a tokenizer on the captions, then text and image tower contrastively on the pairs.

    With `init`, train on from towers and a tokenizer that are there."""

    output_dir: Path = Path("runs/shapes/clip")
    max_steps: int = 600
    batch_size: int = 128
    learning_rate: float = 1e-3
    cooldown_steps: int = 200
    init: str | None = None
    """What to start from: a folder of transformers' CLIPModel gives both towers; a pipeline's or
    run's folder, "emoji", a hub id or open_clip:NAME:WEIGHTS the text tower. Its shapes and its
    tokenizer are then taken in place of those of `clip`, `vocab_size` and `max_tokens`."""
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: which of the batch's captions is an image's, and which image a caption's (CLIP);
    sigmoid: of each pair, whether it is one (SigLIP)."""
    held_out: float = 0.01
    """Share of the images, 256 at most, that are kept out of training to find each other's
    captions among; none if that is fewer than two, and none of a stream."""
    clip: CLIPSize = field(default_factory=CLIPSize)
    vocab_size: int = 3072
    """Tokens at most, of them 514 fixed: bytes, start and end."""
    max_tokens: int = 24
    """Tokens of a prompt, start and end among them; what is longer is cut off with a warning."""
    crop_scale: float = 0.8
    """Training sees random squares whose side is this share of the image's, or more."""
    blur: float = 0.0
    """And each blurred by up to so many pixels: a tower that is to judge an autoencoder's or a
    UNet's images must not live on their finest details."""
    noise: float = 0.0
    """And with Gaussian noise of up to this deviation; images are in [-1, 1]."""

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
                "image with every caption of the batch, so that parts of it have another loss"
            )
        for name in ("blur", "noise"):
            if not 0 <= getattr(self, name) <= 8:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 8")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be in [0, 1)")
        if not self.caption_columns:
            raise ValueError("caption_columns is empty: CLIP is trained on images with captions")


def main() -> None:
    config, settings = parse_config(TrainCLIP)
    logging.disable_progress_bar()  # transformers' would break into ours
    accelerator = make_accelerator(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    processes = Processes(accelerator, timeout=config.timeout)
    run = RunFolder(config.output_dir, settings, processes)
    dataset = processes.in_turn(lambda: open_images(config))
    pool, rest, num_held = None, None, 0
    if isinstance(dataset, CaptionedImages):
        held = held_out(len(dataset), config.held_out, seed=config.seed)
        num_held = len(held) if len(held) > 1 else 0
        check_batch(config.batch_size, len(dataset) - num_held)  # a stream tells when it ends
        if num_held:
            rest = Rest(dataset, held)
            dataset.validation = frozenset(held.tolist())
            pool = processes.everywhere(partial(make_pool, dataset, seed=config.seed))
    elif config.held_out > 0:
        accelerator.print("a stream has no images to hold out: no retrieval is reported")
    clip, tokenizer, scaled = begin(config, dataset)
    fingerprints = {"data": dataset.fingerprint}
    if config.init is not None:  # a resumed run reads it again
        words = {"scaling": asdict(scaled), "tokens": tokenizer.get_vocab()}
        fingerprints["init"] = fingerprint(clip, words)
    learner = Learner(clip, config, accelerator)
    raw, ema = learner.raw, learner.ema
    assert isinstance(raw, CLIPModel)
    assert isinstance(ema, CLIPModel)
    if accelerator.device.type == "cpu":
        # torch's fused attention is slower than plain products there, see models/layers.py.
        raw.set_attn_implementation("eager")
    loss_of = contrastive_loss(config.contrastive, rank=rank, world_size=world_size)

    def tokenize(prompts: list[str]) -> Tensor:
        """(B, L) token ids; training captions may be cut, so here nobody is warned."""
        encoded = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            # What pads may be a word too, such as "!": see models/text.py.
            split_special_tokens=tokenizer.pad_token_id != tokenizer.eos_token_id,
        )
        return encoded.input_ids.to(accelerator.device)

    def step(batch: dict[str, Any], number: int, share: Share) -> Metrics:
        def draw(purpose: str, *shape: int, of: Callable[..., Tensor] = torch.rand) -> Tensor:
            """This process's rows of a global batch, uniform in [0, 1) by default, (B, *shape)."""
            source = generator(config.seed, number, purpose)
            return share.rows(of(config.batch_size, *shape, generator=source))

        images = to_floats(batch["images"].to(accelerator.device))
        images = crop(images, draw("crop", 3).to(images), scale=config.crop_scale)
        if config.blur > 0:
            images = blur(images, config.blur * draw("blur").to(images))
        if config.noise > 0:
            strength = config.noise * draw("noise strength", 1, 1, 1).to(images)
            images = images + strength * draw("noise", *images.shape[1:], of=torch.randn).to(images)
        words = choose(batch["captions"], draw("caption").tolist())
        output = learner.model(input_ids=tokenize(words), pixel_values=scaled(images))
        image, text = output.image_embeds, output.text_embeds  # (B, D), of length 1
        loss = loss_of(image, text, raw)
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
            examples=rest,
        )

    @torch.no_grad()
    def retrieval() -> Metrics:
        assert pool is not None
        towers: Any = ema  # whose methods' types say nothing
        embeds, texts = [], []
        for images in pool.images.split(POOL_BATCH):
            values = scaled(to_floats(images.to(accelerator.device)))
            embeds.append(towers.get_image_features(pixel_values=values).pooler_output)
        for start in range(0, len(pool.captions), POOL_BATCH):
            ids = tokenize(list(pool.captions[start : start + POOL_BATCH]))
            texts.append(towers.get_text_features(input_ids=ids).pooler_output)
        return pool.recall(torch.cat(embeds), torch.cat(texts))

    def validate() -> Metrics:
        # In one process, in batches of one size: the same numbers, however many processes train.
        return processes.on_first(retrieval)

    @torch.no_grad()
    def preview(path: Path) -> None:
        """A row for each of eight captions: the true image, then the seven nearest of 1,024."""
        examples = list(some_examples(dataset, 1024))
        count = len(examples)
        images = torch.stack([example["image"] for example in examples])
        pixels = to_floats(images.to(accelerator.device))
        asked = [i * count // 8 for i in range(8)]
        words = tokenize([examples[i]["captions"][0] for i in asked])
        output = ema(input_ids=words, pixel_values=scaled(pixels))
        nearest = (output.text_embeds @ output.image_embeds.T).topk(min(7, count)).indices
        rows = [[i, *row.tolist()] for i, row in zip(asked, nearest, strict=True)]
        shown = [to_pil(pixels[i]) for row in rows for i in row]
        image_grid(shown, columns=1 + nearest.shape[1]).save(path)

    def save(folder: Path) -> None:
        """`text_encoder/` and `tokenizer/` for the UNet; `clip/`, both towers, for the rest.

        A CLIPModel has no `logit_bias`: it goes into `clip/config.json`, where `init` finds it.
        """
        assert isinstance(ema.config.text_config, CLIPTextConfig)
        tower = CLIPTextModel(ema.config.text_config)
        names = tower.state_dict().keys()
        weights = {name.removeprefix("text_model."): v for name, v in ema.state_dict().items()}
        tower.load_state_dict({name: weights[name.removeprefix("text_model.")] for name in names})
        TextEncoder(tower, tokenizer).save_pretrained(folder)
        state = ema.state_dict()
        if (bias := state.pop("logit_bias", None)) is not None:
            ema.config.logit_bias = float(bias)
        ema.save_pretrained(folder / "clip", state_dict=state)
        save_tokenizer(tokenizer, folder / "clip")
        side = {"height": config.image_size, "width": config.image_size}
        CLIPImageProcessor(
            size=side, crop_size=side, image_mean=list(scaled.mean), image_std=list(scaled.std)
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
        validate=None if pool is None else validate,
        fingerprints=fingerprints,
        summary=images_summary(dataset, held_out=num_held),
    )


def begin(
    config: TrainCLIP, dataset: CaptionedImages | StreamedImages
) -> tuple[CLIPModel, CLIPTokenizer, Pixels]:
    """Both towers as training finds them, the tokenizer, and how images are scaled.

    Raises ValueError where `init` is no CLIP or has other shapes than the configuration asks for.
    """
    torch.manual_seed(config.seed)
    if config.init is None:
        tokenizer = train_tokenizer(
            some_captions(dataset, MOST_CAPTIONED),
            vocab_size=config.vocab_size,
            length=config.max_tokens,
        )
        clip = new_clip(config.clip, tokenizer, image_size=config.image_size)
        scaled, bias = Pixels(), None
    else:
        start = load_start(config.init, config.clip, image_size=config.image_size)
        check_shapes(config, start.shapes)
        tokenizer, (clip, scaled, bias) = start.tokenizer, start.towers
    if config.contrastive == "sigmoid":
        if bias is None:
            bias = SIGMOID_BIAS
            clip.logit_scale.data.fill_(SIGMOID_SCALE)
        clip.register_parameter("logit_bias", nn.Parameter(torch.tensor(bias)))
    return clip, tokenizer, scaled


def check_shapes(config: TrainCLIP, shapes: Mapping[str, int]) -> None:
    """Raise ValueError for an option that asks for other shapes than those of `init`.

    One that is left as it is by default asks for nothing.
    """
    plain = TrainCLIP()
    for name, own in shapes.items():
        asked = attrgetter(name)
        if asked(config) not in (asked(plain), own):
            raise ValueError(
                f"{name}={asked(config)} contradicts init={config.init!r}, whose is {own}: "
                "leave it out"
            )


def contrastive_loss(
    kind: str, *, rank: int, world_size: int
) -> Callable[[Tensor, Tensor, CLIPModel], Tensor]:
    """The loss () of this process's pairs of embeddings (B, D) with those of all processes.

    The mean over the processes is that of the whole batch.
    """
    if kind == "softmax":
        softmax = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        return lambda image, text, clip: softmax(image, text, clip.logit_scale.exp())
    # "gather" is the one of its ways that asks for a collective alone, which every backend has.
    sigmoid = SigLipLoss(rank=rank, world_size=world_size, dist_impl="gather")
    return lambda image, text, clip: sigmoid(image, text, clip.logit_scale.exp(), clip.logit_bias)


def make_pool(dataset: CaptionedImages, *, seed: int) -> Pool | None:
    """The good samples of the validation split, each with one of its captions and with all.

    None if they are fewer than two.
    """
    found = {number: dataset[number] for number in sorted(dataset.validation)}
    found = {n: example for n, example in found.items() if n not in dataset.replaced}
    if len(found) < 2:
        return None
    places = [
        float(torch.rand((), generator=generator(seed, number, "held out caption")))
        for number in found
    ]
    captions = [example["captions"] for example in found.values()]
    images = torch.stack([example["image"] for example in found.values()])
    return Pool.of(images, choose(captions, places), captions)


def crop(images: Tensor, places: Tensor, *, scale: float) -> Tensor:
    """Cut random squares and enlarge them to the image's size (open_clip trains on such).

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
    """Blur each image (B, C, H, W) by a Gaussian of its own deviation, (B,) in pixels."""
    reach = max(1, math.ceil(3 * float(sigma.max())))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)  # (B, K)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    channels = images.shape[1]
    rows = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    weights = kernels.repeat_interleave(channels, dim=0)  # one for each image and channel
    x = rearrange(rows, "b c h w -> 1 (b c) h w")
    x = F.conv2d(x, weights[:, None, None, :], groups=len(weights))
    x = F.conv2d(x, weights[:, None, :, None], groups=len(weights))
    return rearrange(x, "1 (b c) h w -> b c h w", c=channels)


if __name__ == "__main__":
    run_script(main)
