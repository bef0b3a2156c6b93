"""Train your own text-to-image latent diffusion model and draw images with it; see `Pipeline`.

`import latentdiff` itself imports neither torch nor transformers: what is in `__all__` is imported
when it is first accessed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline, PipelineOutput
    from latentdiff.request import Request

__all__ = ["Pipeline", "PipelineOutput", "Request", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in ("Pipeline", "PipelineOutput"):
        from latentdiff import pipeline

        return getattr(pipeline, name)
    if name == "Request":
        from latentdiff.request import Request

        return Request
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
