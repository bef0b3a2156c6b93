"""DataConfig: which images and captions a script reads, at what size, and which samples are bad."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.data.buckets import Size, bucket_sizes
from latentdiff.data.captions import CaptionRules, as_list
from latentdiff.data.decode import Decoding
from latentdiff.data.forms.detect import splits
from latentdiff.data.shapes import build_shapes
from latentdiff.options import NEEDS, option

SHAPES_FOLDER = Path("runs/shapes/data")  # `data: shapes` writes its images here, once
MAX_ASPECT = 16.0  # upper bound of `max_aspect`
OWN_CAPTIONS = "instance_prompts=[]"  # what the options of captions need


@dataclass(frozen=True)
class DataConfig:
    """Which images and captions a script reads, at what size, and which samples are bad."""

    data: str = "shapes"
    """A folder of images, .tar or .parquet files, a hub data set, or "shapes": a small data set
    that is generated when it is first used."""
    split: str = "train"
    image_size: int = 64
    """Side in pixels: the shorter side is scaled to it and the middle cropped."""
    bucket_step: int = option(0, fingerprinted=False)
    """0: all latents are of square crops. Otherwise each image is cropped to the aspect-ratio
    bucket nearest to its shape: sides are multiples of bucket_step, and a bucket has at most the
    square's pixels."""
    max_aspect: float = option(2.0, fingerprinted=False, needs="bucket_step")
    """With bucket_step: the largest ratio of a bucket's longer side to its shorter one."""
    image_column: str = "image"
    instance_prompts: Sequence[str] = option((), fingerprinted=False)
    """The captions of every image, such as '["a photo of sks dog"]', in place of those of the data,
    which needs none; each training step draws one of them."""
    caption_columns: Sequence[str] = option(("text",), needs=OWN_CAPTIONS)
    """Columns with a caption or a list of captions; each training step draws one of them all."""
    caption_templates: Mapping[str, Sequence[str]] = field(
        default_factory=dict, metadata={NEEDS: OWN_CAPTIONS}
    )
    """For each column, templates such as "a {}"; each makes one caption of each of the column's.
    {style} stands for the text in the row's column `style`."""
    caption_weights: Mapping[str, str | float] = field(
        default_factory=dict, metadata={NEEDS: OWN_CAPTIONS}
    )
    """For each column of captions, its weight, which its captions in a row share equally, or the
    name of the column with the weight of each: a number or a list of them."""
    allow_empty_caption: bool = option(False, needs=f"caption_columns and {OWN_CAPTIONS}")
    """Train on images without a caption as if they had an empty one."""
    exclude: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """For each column, values; rows with one of these values, or with one in a list, are left out.
    A number or true is given as its text."""
    upscale_limit: float = 1.0
    """Images that would have to be enlarged by more than this factor are bad."""
    max_megapixels: float = 64
    """Larger images are bad; only their header is read."""
    first_frame: bool = False
    """Take the first frame of an animation; otherwise animations are bad."""
    background: str = "white"
    """The colour behind transparent images, such as "white" or "#808080"."""
    bad_samples: Path | None = option(None, fingerprinted=False)
    """The list that `latentdiff data check` wrote, whose samples are left out; None reads
    bad_samples.jsonl in `data`, if it exists."""
    max_bad: float = option(0.01, fingerprinted=False)
    """The fraction of bad samples above which the data is refused."""
    num_workers: int = option(0, may_change=True, fingerprinted=False)
    """Worker processes that prefetch images; with `stream`, threads of one worker process."""
    stream: bool = False
    """Read the data shard by shard, without an index of all samples: for data sets that are too
    large to index or to download."""
    shuffle_buffer: int = option(1000, fingerprinted=False, needs="stream")
    """With stream: the number of samples in the shuffle buffer."""

    def __post_init__(self) -> None:
        for name in ("image_size", "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.bucket_step < 0 or (self.bucket_step and self.image_size % self.bucket_step):
            raise ValueError(
                f"bucket_step={self.bucket_step} must be 0 or divide image_size={self.image_size}"
            )
        if not 1 <= self.max_aspect <= MAX_ASPECT:
            raise ValueError(f"max_aspect={self.max_aspect} must be in [1, {MAX_ASPECT}]")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must not be negative")
        if not self.upscale_limit >= 1:  # nor is NaN
            raise ValueError(f"upscale_limit={self.upscale_limit} must be at least 1")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad={self.max_bad} must be in [0, 1]")
        self.decoding()
        if any(not prompt.strip() for prompt in self.instance_prompts):
            raise ValueError(
                f"instance_prompts={list(self.instance_prompts)} must be texts that are not blank"
            )
        for field_name in ("caption_templates", "caption_weights"):
            for name in getattr(self, field_name):
                if name not in self.caption_columns:
                    raise ValueError(
                        f"{field_name}: {name!r} must be one of "
                        f"caption_columns={list(self.caption_columns)}"
                    )
        for name, forms in self.caption_templates.items():
            if not forms or any("{}" not in form for form in forms):
                raise ValueError(
                    f"caption_templates: {name!r} must have forms with {{}}, not {list(forms)}"
                )
        for name, weight in self.caption_weights.items():
            if not isinstance(weight, str) and not 0 <= weight < math.inf:
                raise ValueError(f"caption_weights: {name!r} has {weight}, which must be 0 or more")

    def location(self) -> str:
        """Return the folder, file or hub id of the data; "shapes" is generated if it is missing."""
        if self.data != "shapes":
            return self.data
        if not SHAPES_FOLDER.exists():
            build_shapes(SHAPES_FOLDER, count=2000, seed=0, size=64)
        return str(SHAPES_FOLDER)

    def splits(self) -> list[str]:
        """List the names of the data's splits. Raises ValueError for data that cannot be read."""
        return splits(self.location())

    def excluding(self, name: str, value: object) -> set[str]:
        """Return which values of `exclude` a row has in a column: it is left out if it has any."""
        values = self.exclude[name]
        known = (v if v in values or isinstance(v, str) else json.dumps(v) for v in as_list(value))
        return {text for text in known if text in values}

    def columns(self) -> list[str]:
        """List the columns that the options name, the images' column first."""
        named = (*self.caption_rules().named(), *self.exclude)
        return list(dict.fromkeys((self.image_column, *named)))

    def check_columns(
        self, columns: Sequence[str], image_columns: Sequence[str], where: str = ""
    ) -> None:
        """Raise ValueError for a named column that is missing, or an image column without images.

        `columns` are those of the data, `image_columns` those of them that hold images; `where`
        tells in the message which samples were looked at.
        """
        for name in self.caption_rules().template_columns():
            if name not in columns:
                raise ValueError(
                    f"caption_templates name {{{name}}}, but data={self.data!r} has no column "
                    f"{name!r}{where}, only {list(columns)}; {{}} stands for the caption"
                )
        for name in self.columns():
            if name not in columns:
                raise ValueError(
                    f"data={self.data!r} has no column {name!r}{where}, only {list(columns)}; "
                    "captions are in metadata.jsonl beside the images, with rows such as "
                    '{"file_name": "1.png", "text": "a cat"}, or in a .txt file for each'
                )
        if self.image_column not in image_columns:
            raise ValueError(
                f"data={self.data!r}: the column {self.image_column!r} holds no images; those "
                f"that do are {list(image_columns)}"
            )

    def with_prompts(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return what identifies the data, with `instance_prompts` where there are any.

        Without them it is what it was before the option was there, and so are fingerprints.
        """
        prompts = list(self.instance_prompts)
        return options | ({"instance_prompts": prompts} if prompts else {})

    def caption_rules(self) -> CaptionRules:
        """Return the options that turn columns into captions."""
        if self.instance_prompts:
            return CaptionRules(columns=(), prompts=self.instance_prompts)
        return CaptionRules(
            columns=self.caption_columns,
            templates=self.caption_templates,
            weights=self.caption_weights,
            allow_empty=self.allow_empty_caption,
        )

    def buckets(self) -> tuple[Size, ...]:
        """Return the sizes (width, height) to which images are cropped before they are encoded."""
        return bucket_sizes(self.image_size, self.bucket_step, self.max_aspect)

    def decoding(self) -> Decoding:
        """Return the options of the image decoder. Raises ValueError for an impossible value."""
        return Decoding(
            background=self.background,
            max_megapixels=self.max_megapixels,
            first_frame=self.first_frame,
        )
