"""The judge of captioned drawings: is the concept right that a drawing shows, and its style?

A drawing's concept is that of the nearest reference image, by the cosine of whitened features.
N references, B drawings, D features, E of them after whitening, K concepts.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.references import References

VERSION = 1
"""Counts up with every change by which a judge may say something else."""

ALIKE = 30.0
"""Two images are drawn alike if their PSNR is above this, in dB.

Two such images of one style show each other's concepts, and two of one concept each other's styles.
A VAE is asked for the same PSNR."""
COMPARED = 2**24
"""The number of pixels' values that are compared at once, as float64."""

WHITENED = 512
"""The number of principal directions that are kept, E at most."""
FLOOR = 0.02
"""Directions whose deviation is below this share of the largest are not blown up to it."""

Look = Callable[[Iterable[Image.Image]], Tensor]
"""Features (B, D) of RGB images of any size."""


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of B drawings."""

    nearest: Tensor
    """The nearest reference of each (B,)."""
    concept_right: Tensor
    """(B,) bool."""
    style_right: Tensor
    """(B,) bool."""


class Judge:
    """Looks at the references once, and then at any drawings."""

    def __init__(
        self, look: Look, references: References, *, features: Tensor | None = None
    ) -> None:
        """`features` (N, D) of the references, if they are known already."""
        self.references = references
        self._look = look
        if features is None:
            features = features_of(references, look)
        self._mean = features.mean(dim=0)
        self._whitening = _whitening(features - self._mean)  # (D, E)
        self.vectors = self._whitened(features)  # (N, E)
        self.concepts = _numbers(references.concepts)
        self._styles = _numbers(references.styles)
        self.shows = _shown(references.pixels, self.concepts, of_one=self._styles)  # (N, K) bool
        self._has = _shown(references.pixels, self._styles, of_one=self.concepts)

    def __call__(self, drawings: Iterable[Image.Image], wanted: Sequence[int]) -> Verdicts:
        """Judge drawings, each of which should show what the reference of number `wanted` shows.

        The concept is right if the nearest of all references, of any style and split, shows it. The
        style is right if, of the references that show the wanted concept, the nearest has it; so a
        drawing of something else may have it too.
        """
        index = torch.tensor(wanted, dtype=torch.long)
        likeness = self._whitened(self._look(drawings).float()) @ self.vectors.T  # (B, N)
        nearest = likeness.argmax(dim=1)
        shows_wanted = self.shows[:, self.concepts[index]].T  # (B, N)
        of_concept = likeness.masked_fill(~shows_wanted, -torch.inf).argmax(dim=1)
        return Verdicts(
            nearest=nearest,
            concept_right=self.shows[nearest, self.concepts[index]],
            style_right=self._has[of_concept, self._styles[index]],
        )

    def _whitened(self, features: Tensor) -> Tensor:
        """Unit vectors (B, E) of features (B, D)."""
        return F.normalize((features - self._mean) @ self._whitening, dim=1)


def features_of(references: References, look: Look) -> Tensor:
    """Look at all references: (N, D) float32."""
    return look(references.image(i) for i in range(len(references))).float()


def _whitening(centred: Tensor) -> Tensor:
    """The principal directions of features (N, D), each over its deviation: (D, E)."""
    values, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    kept = min(WHITENED, *centred.shape)
    deviations = values.flip(0)[:kept].clamp(min=0).sqrt()
    return directions.flip(1)[:, :kept] / (deviations + FLOOR * deviations[0])


def _numbers(names: Sequence[str]) -> Tensor:
    """Number the different names: (N,)."""
    numbers = {name: i for i, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names])


def _shown(pixels: Tensor, labels: Tensor, *, of_one: Tensor) -> Tensor:
    """The labels of each image (N, 3, S, S), its own and those of images alike: (N, K) bool.

    Only images with the same value of `of_one` (N,) are compared.
    """
    shown = F.one_hot(labels).bool()
    limit = 255**2 * 10 ** (-ALIKE / 10) * pixels[0].numel()  # of the sum of squared errors
    for value in of_one.unique():
        parts = (of_one == value).nonzero()[:, 0].split(max(1, COMPARED // pixels[0].numel()))
        for rows, others in itertools.product(parts, parts):
            for i, j in (_squared_errors(pixels[rows], pixels[others]) < limit).nonzero():
                shown[rows[i], labels[others[j]]] = True
    return shown


def _squared_errors(images: Tensor, others: Tensor) -> Tensor:
    """Sums over the pixels of all pairs of images (A, 3, S, S) and (B, 3, S, S): (A, B), exact."""
    a, b = images.flatten(1).double(), others.flatten(1).double()
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
