"""Zero-shot retrieval: among held-out images and captions, how often a CLIP finds the right one.

Recall at K as in CLIP (Radford et al. 2021, section 3.1.4), over a fixed pool, so that two values
differ by the weights alone. P images and T captions, each once; D numbers an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.training.meter import Metrics

RANKS = (1, 5)


@dataclass(frozen=True)
class Pool:
    """Different images and different captions, and which caption is right for which image."""

    images: Tensor
    """(P, 3, S, S) uint8."""
    captions: Sequence[str]
    """T of them."""
    right: Tensor
    """(P, T) bool: at least one in each row and column."""

    @classmethod
    def of(cls, images: Tensor, asked: Sequence[str], captions: Sequence[Sequence[str]]) -> Self:
        """The pool of examples: their images (N, 3, S, S), a caption of each, and all of each.

        Equal images are one, and so are equal captions: copies would fill the first places of
        every answer. A caption is right for an image if any example has both.
        """
        contents = dict.fromkeys(image.numpy().tobytes() for image in images)
        numbers = {content: number for number, content in enumerate(contents)}
        places = [numbers[image.numpy().tobytes()] for image in images]
        texts = {text: number for number, text in enumerate(dict.fromkeys(asked))}
        right = torch.zeros(len(numbers), len(texts), dtype=torch.bool)
        for place, own in zip(places, captions, strict=True):
            for text in own:
                if text in texts:
                    right[place, texts[text]] = True
        first = [places.index(number) for number in range(len(numbers))]
        return cls(images[first], list(texts), right)

    def recall(self, image_embeds: Tensor, text_embeds: Tensor) -> Metrics:
        """Shares of the images and captions with a right one among the K nearest, for each K.

        `retrieval_text@K` asks an image for a caption, `retrieval_image@K` a caption for a
        image. The embeddings are (P, D) and (T, D), of any length.
        """
        image, text = (F.normalize(x.float().cpu(), dim=1) for x in (image_embeds, text_embeds))
        similarity = image @ text.T  # (P, T)
        found = {}
        for name, scores, right in (
            ("text", similarity, self.right),
            ("image", similarity.T, self.right.T),
        ):
            best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
            # A wrong one that is as near counts as nearer: a CLIP to which all is equal has 0.
            before = ((scores >= best) & ~right).sum(dim=1)
            for k in RANKS:
                found[f"retrieval_{name}@{k}"] = (before < k).double().mean()
        return found
