"""PriorConfig: images of the subject's class beside those of the subject (DreamBooth)."""

from dataclasses import dataclass
from pathlib import Path

from latentdiff.options import option


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation: a model that learns a few images of one subject forgets the others of its
    class, unless it is trained on images of the class as well (Ruiz et al. 2022, eq. 2).

    Both kinds come as often, whatever their numbers. That is why there is no option for repeats:
    a run is as long as its steps, so repeating all images alike would change nothing.
    """

    class_prompt: str | None = None
    """The class of the subject, such as "a photo of a dog": the caption of class images, which are
    trained on as often as the data's."""
    class_data: Path | None = None
    """A folder of images of the class; without it `init` draws them, into the run folder. Without
    `class_prompt` they are any images that are not to be forgotten, with captions of their own, by
    the data's caption options and `exclude`."""
    num_class_images: int = option(100, needs="class_prompt and class_data=null")
    """How many images of the class `init` draws, in 50 steps with a guidance scale of 7.5."""
    prior_loss_weight: float = option(1.0, needs="class_prompt or class_data")
    """Weight of the loss of class images. The loss is the mean over both kinds, half of diffusers'
    mean of the own ones plus prior_loss_weight times the mean of the class; for AdamW it is one."""

    @property
    def is_on(self) -> bool:
        """Whether there are class images."""
        return self.class_prompt is not None or self.class_data is not None

    def __post_init__(self) -> None:
        if self.class_prompt is not None and not self.class_prompt.strip():
            raise ValueError("class_prompt must not be blank")
        if self.num_class_images < 1:
            raise ValueError(f"num_class_images={self.num_class_images} must be at least 1")
        if not 0 < self.prior_loss_weight < float("inf"):
            raise ValueError(f"prior_loss_weight={self.prior_loss_weight} must be positive")
