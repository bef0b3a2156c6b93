"""Train your own text-to-image latent diffusion model and draw images with it; see `Pipeline`.

`import latentdiff` itself imports neither torch nor transformers: `Pipeline` is imported when it is
first accessed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "Pipeline":
        from latentdiff.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
