"""The work of `latentdiff eval distance`: look at two folders, write, print."""

import argparse
import hashlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

from latentdiff.data.crop_flip import crop_to
from latentdiff.data.folder import check_side
from latentdiff.evaluation.distances import Comparison, compare
from latentdiff.evaluation.features import images_of, warn_of_unread
from latentdiff.evaluation.intervals import Interval
from latentdiff.evaluation.looks import find_look
from latentdiff.evaluation.results import Figure, Result, check_result_path, write_result


def distance(arguments: argparse.Namespace) -> None:
    """Say how far two folders are apart; see `latentdiff eval distance --help`."""
    side = arguments.image_size
    if side is not None:
        check_side(side, name="image_size")
    check_result_path(arguments.out)
    # The folders first, so that their errors come before a network is loaded.
    sets = [images_of(folder) for folder in (arguments.drawn, arguments.true)]
    for folder in (arguments.drawn, arguments.true):
        warn_of_unread(folder)
    named = find_look(arguments.features, whole=True)
    digests = [hashlib.sha256(), hashlib.sha256()]
    drawn, true = (
        named.look(_sized(images, side, digest))
        for images, digest in zip(sets, digests, strict=True)
    )
    comparison = compare(drawn, true)
    print(
        f"Fréchet distance {comparison.frechet:.4g}, "
        f"kernel distance {comparison.kernel:.4g} ({_ends(comparison.kernel_interval)}), "
        f"precision {comparison.precision:.1%}, recall {comparison.recall:.1%} "
        f"({comparison.num_drawn} drawn and {comparison.num_true} true images, "
        f"{drawn.shape[1]} features)"
    )
    if arguments.out is not None:
        result = Result(
            settings={
                "features": named.description,
                "true": digests[1].hexdigest(),
                "image_size": side,
                "num_drawn": len(drawn),
            },
            subject={"drawn": str(arguments.drawn), "sha256": digests[0].hexdigest()},
            figures=_distances(comparison),
        )
        write_result(result, arguments.out)


def _distances(comparison: Comparison) -> dict[str, Figure]:
    c = comparison
    return {
        "kernel": Figure(c.kernel, *c.kernel_interval, of=c.num_drawn),
        "precision": Figure(c.precision, *c.precision_interval, of=c.num_drawn),
        "recall": Figure(c.recall, *c.recall_interval, of=c.num_true),
    }


def _sized(images: Iterator[Image.Image], side: int | None, digest: Any) -> Iterator[Image.Image]:
    """The images, brought to one size where it is given; their pixels go into the digest."""
    for image in images:
        sized = image if side is None else crop_to(image, (side, side))
        digest.update(f"{sized.size}".encode() + sized.tobytes())
        yield sized


def _ends(interval: Interval) -> str:
    return f"95 %: {interval.low:.4g} to {interval.high:.4g}"
