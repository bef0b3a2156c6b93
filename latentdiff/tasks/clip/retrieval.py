"""Zero-shot retrieval: recall at K among the images and captions of the validation split.

As in CLIP (Radford et al. 2021, section 3.1.4); the pool is fixed, so that two values differ by the
weights alone. It has P images and T captions; D is the width of the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.dataset import CaptionedImages
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import choose, generator

RANKS = (1, 5)


@dataclass(frozen=True)
class Pool:
    """Distinct images and captions, and which of them match."""

    images: Tensor
    """(P, 3, S, S) uint8."""
    captions: Sequence[str]
    """T captions."""
    matches: Tensor
    """(P, T) bool: at least one in each row and column."""

    @classmethod
    def of(cls, images: Tensor, queries: Sequence[str], captions: Sequence[Sequence[str]]) -> Self:
        """The pool of N examples: their images (N, 3, S, S), one query caption of each, and all
        captions of each.

        Duplicates are merged, since they would fill the first ranks of every answer. A caption
        matches an image if any example has both.
        """
        contents = [image.numpy().tobytes() for image in images]
        image_index = {content: i for i, content in enumerate(dict.fromkeys(contents))}
        text_index = {text: i for i, text in enumerate(dict.fromkeys(queries))}
        matches = torch.zeros(len(image_index), len(text_index), dtype=torch.bool)
        for content, texts in zip(contents, captions, strict=True):
            for text in texts:
                if text in text_index:
                    matches[image_index[content], text_index[text]] = True
        first = [contents.index(content) for content in image_index]
        return cls(images[first], list(text_index), matches)

    def recall(self, image_embeds: Tensor, text_embeds: Tensor) -> Metrics:
        """The fractions of images and of captions with a match among the K nearest, for each K.

        `retrieval_text@K` asks for an image's caption, `retrieval_image@K` for a caption's image.
        The embeddings are (P, D) and (T, D), of any length. A K of which more than half would be
        right by chance is left out: 5 of fewer than ten, and all of fewer than two.
        """
        image, text = (F.normalize(x.float().cpu(), dim=1) for x in (image_embeds, text_embeds))
        similarity = image @ text.T  # (P, T)
        metrics = {}
        for name, scores, matches in (
            ("text", similarity, self.matches),
            ("image", similarity.T, self.matches.T),
        ):
            best = scores.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
            # A tie counts as an error: a CLIP whose embeddings are all equal has recall 0.
            rank = ((scores >= best) & ~matches).sum(dim=1)
            for k in (k for k in RANKS if 2 * k <= min(self.matches.shape)):
                metrics[f"retrieval_{name}@{k}"] = (rank < k).double().mean()
        return metrics


def validation_pool(dataset: CaptionedImages, *, seed: int) -> Pool | None:
    """The intact examples of the validation split, each with one of its captions at random.

    None if there are fewer than two.
    """
    examples = {index: dataset[index] for index in sorted(dataset.validation)}
    examples = {i: example for i, example in examples.items() if i not in dataset.replaced}
    if len(examples) < 2:
        return None
    u = [float(torch.rand((), generator=generator(seed, i, "held out caption"))) for i in examples]
    captions = [example["captions"] for example in examples.values()]
    images = torch.stack([example["image"] for example in examples.values()])
    return Pool.of(images, choose(captions, u), captions)
