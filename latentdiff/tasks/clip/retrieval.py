"""Zero-shot retrieval: among validation images and captions, how often a CLIP finds the right one.

Recall at K as in CLIP (Radford et al. 2021, section 3.1.4), over a fixed pool, so that two values
differ by the weights alone. P images and T captions, each once; D is the width of an embedding.
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
    """Different images and different captions, and which caption matches which image."""

    images: Tensor
    """(P, 3, S, S) uint8."""
    captions: Sequence[str]
    """T of them."""
    matches: Tensor
    """(P, T) bool: at least one in each row and column."""

    @classmethod
    def of(cls, images: Tensor, queries: Sequence[str], captions: Sequence[Sequence[str]]) -> Self:
        """The pool of examples: their images (N, 3, S, S), a caption of each, and all of each.

        Equal images are one, and so are equal captions: copies would fill the first ranks of every
        answer. A caption matches an image if any example has both.
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
        """Fractions of the images and captions with a match among the K nearest, for each K.

        `retrieval_text@K` asks for an image's caption, `retrieval_image@K` for a caption's image.
        The embeddings are (P, D) and (T, D), of any length.
        """
        image, text = (F.normalize(x.float().cpu(), dim=1) for x in (image_embeds, text_embeds))
        similarity = image @ text.T  # (P, T)
        metrics = {}
        for name, scores, matches in (
            ("text", similarity, self.matches),
            ("image", similarity.T, self.matches.T),
        ):
            best = scores.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
            # A wrong one that is as near counts as nearer: a CLIP to which all is equal has 0.
            rank = ((scores >= best) & ~matches).sum(dim=1)
            for k in RANKS:
                metrics[f"retrieval_{name}@{k}"] = (rank < k).double().mean()
        return metrics


def validation_pool(dataset: CaptionedImages, *, seed: int) -> Pool | None:
    """The good samples of the validation split, each with one caption drawn from its captions.

    None if they are fewer than two.
    """
    examples = {index: dataset[index] for index in sorted(dataset.validation)}
    examples = {i: example for i, example in examples.items() if i not in dataset.replaced}
    if len(examples) < 2:
        return None
    u = [float(torch.rand((), generator=generator(seed, i, "held out caption"))) for i in examples]
    captions = [example["captions"] for example in examples.values()]
    images = torch.stack([example["image"] for example in examples.values()])
    return Pool.of(images, choose(captions, u), captions)
