"""CLIPTask: trains a text and an image tower on captioned images (CLIP, Radford et al. 2021).

Shapes: B images of a global batch, b of the local one, L tokens, D width of the embeddings.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextConfig

from latentdiff.data.caption_table import CaptionTable, CaptionTokens
from latentdiff.data.opening import ImageDataset
from latentdiff.data.summary import images_summary
from latentdiff.formats.ldm.keys import TEXT_MODEL
from latentdiff.images import image_grid, to_floats, to_pil
from latentdiff.models.clip_text import CLIPText
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.text import TextEncoder, save_tokenizer
from latentdiff.tasks.clip.augmentation import augment, draws
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.clip.loss import contrastive_loss
from latentdiff.tasks.clip.retrieval import Pool
from latentdiff.tasks.clip.start import MAX_CAPTIONED, check_captions, make_start
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import MicroBatch, choose, generator
from latentdiff.training.run import Run

MAX_LOGIT_SCALE = math.log(100)  # CLIP, section 2.5: clipped to keep training stable
POOL_BATCH = 64  # a constant, since sums in other batches differ in their last bits


class CLIPTask:
    """The step, retrieval, preview and saved folders of a CLIP and its tokenizer."""

    def __init__(
        self,
        config: TrainCLIP,
        run: Run,
        *,
        dataset: ImageDataset,
        pool: Pool | None,
        num_val: int = 0,
        captions: CaptionTable | None = None,
    ) -> None:
        """`pool` is of the validation split, which has `num_val` images; `captions` is the table
        of images that are in memory.

        Raises ValueError where `init` is no CLIP or has other shapes than the configuration asks
        for.
        """
        self.config, self.run, self.dataset, self.pool = config, run, dataset, pool
        start = make_start(config, dataset)
        self.tokenizer, self.scaling = start.tokenizer, start.scaling
        check_captions(dataset.caption_lists(MAX_CAPTIONED), self._token_ids)
        self.tokens = None
        if captions is not None:
            self.tokens = CaptionTokens(captions, self._token_ids)
            run.accelerator.print(f"in memory: {self.tokens.summary()}")
        self.fingerprints = {"data": dataset.fingerprint}
        if config.init is not None:  # a resumed run reads it again
            facts = {"scaling": asdict(self.scaling), "tokens": self.tokenizer.get_vocab()}
            self.fingerprints["init"] = fingerprint(start.clip, facts)
        self.data_summary = images_summary(dataset, num_val=num_val)
        self.learner = run.learner(start.clip, compute=run.compiled())
        self.learners = {"clip": self.learner}
        self.clip: Any = self.learner.model
        self.ema: Any = self.learner.ema  # Any: transformers types its methods loosely
        if run.device.type == "cpu":
            # torch's fused attention is slower than plain products there, see models/layers.py.
            self.clip.set_attn_implementation("eager")
        self.loss = contrastive_loss(
            config.contrastive, rank=run.processes.rank, world_size=run.processes.count
        )

    def prepare(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """A process's images (b, 3, S, S) uint8 with token ids (b, L) and their step's random
        numbers.

        `batch` has all captions of each image, or rows of the tokens in memory.
        """
        loop, processes = self.config.loop, self.run.processes

        def draw(purpose: str, *shape: int, of: Callable[..., Tensor] = torch.rand) -> Tensor:
            """The local rows (b, *shape) of random numbers that are drawn for the global batch."""
            drawn = of(loop.batch_size, *shape, generator=generator(loop.seed, step, purpose))
            return MicroBatch(processes.rank, processes.count).rows(drawn)

        u, images = draw("caption"), batch["images"]
        if self.tokens is None:
            ids = self._token_ids(choose(batch["captions"], u.tolist()))
        else:
            ids = self.tokens(batch["rows"], u)
        drawn = draws(self.config.augmentation, images.shape[1:], draw)
        return {"images": images, "input_ids": ids, **drawn}

    def step(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Metrics:
        """The local batch of what `prepare` made, on the device."""
        images = augment(to_floats(batch["images"]), self.config.augmentation, batch)
        output = self.learner.forward_model(
            input_ids=batch["input_ids"], pixel_values=self.scaling(images)
        )
        image, text = output.image_embeds, output.text_embeds  # (b, D), unit length
        loss = self.loss(image, text, self.clip)
        accuracy = self._accuracy(image, text)
        grad_norm = self.learner.update(loss, micro_batch)
        self.clip.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        return {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm}

    @torch.no_grad()
    def _accuracy(self, image: Tensor, text: Tensor) -> Tensor:
        """The fraction () of local images whose caption is nearest among the global batch's."""
        offset = self.run.processes.rank * len(image)
        targets = torch.arange(len(image), device=image.device) + offset
        all_texts = self.run.accelerator.gather(text)
        assert isinstance(all_texts, Tensor)
        return (image @ all_texts.T).argmax(dim=1).eq(targets).float().mean()

    def _tokenize(self, prompts: list[str]) -> Tensor:
        return self._token_ids(prompts).to(self.run.device)

    def _token_ids(self, prompts: list[str]) -> Tensor:
        """(b, L) token ids; training captions may be truncated, so here without a warning."""
        return self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            # The padding token may be a word too, such as "!": see models/text.py.
            split_special_tokens=self.tokenizer.pad_token_id != self.tokenizer.eos_token_id,
        ).input_ids

    def validate(self) -> Metrics:
        """Recall on the validation split; one process computes it, so that any run has the same."""
        pool = self.pool
        return {} if pool is None else self.run.processes.on_main(lambda: self._retrieval(pool))

    @torch.no_grad()
    def _retrieval(self, pool: Pool) -> Metrics:
        images, texts = [], []
        for batch in pool.images.split(POOL_BATCH):
            pixels = self.scaling(to_floats(batch.to(self.run.device)))
            images.append(self.ema.get_image_features(pixel_values=pixels).pooler_output)
        for start in range(0, len(pool.captions), POOL_BATCH):
            ids = self._tokenize(list(pool.captions[start : start + POOL_BATCH]))
            texts.append(self.ema.get_text_features(input_ids=ids).pooler_output)
        return pool.recall(torch.cat(images), torch.cat(texts))

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Draw a row for each of eight captions: its own image, then the seven nearest of 1,024."""
        examples = list(self.dataset.some_examples(1024))
        count = len(examples)
        images = torch.stack([example["image"] for example in examples])
        pixels = to_floats(images.to(self.run.device))
        queries = [i * count // 8 for i in range(8)]
        ids = self._tokenize([examples[i]["captions"][0] for i in queries])
        output = self.ema(input_ids=ids, pixel_values=self.scaling(pixels))
        nearest = (output.text_embeds @ output.image_embeds.T).topk(min(7, count)).indices
        rows = [[i, *row.tolist()] for i, row in zip(queries, nearest, strict=True)]
        cells = [to_pil(pixels[i]) for row in rows for i in row]
        image_grid(cells, columns=1 + nearest.shape[1]).save(path)

    def save(self, folder: Path) -> None:
        """Write `text_encoder/` and `tokenizer/` for the UNet, and `clip/` with both towers.

        A CLIPModel has no `logit_bias`: it goes into `clip/config.json`, where `init` finds it.
        """
        assert isinstance(self.ema.config.text_config, CLIPTextConfig)
        tower = CLIPText(self.ema.config.text_config)
        weights = self.ema.state_dict()
        tower.load_state_dict({name: weights[TEXT_MODEL + name] for name in tower.state_dict()})
        TextEncoder(tower, self.tokenizer).save_pretrained(folder)
        state = self.ema.state_dict()
        if (bias := state.pop("logit_bias", None)) is not None:
            self.ema.config.logit_bias = float(bias)
        self.ema.save_pretrained(folder / "clip", state_dict=state)
        save_tokenizer(self.tokenizer, folder / "clip")
        side = {"height": self.config.data.image_size, "width": self.config.data.image_size}
        CLIPImageProcessor(
            size=side,
            crop_size=side,
            image_mean=list(self.scaling.mean),
            image_std=list(self.scaling.std),
        ).save_pretrained(folder / "clip")
