"""Tiny students, and the diffusions that they are tested with."""

from dataclasses import replace
from pathlib import Path

from latentdiff.diffusion import Diffusion
from support.tiny import tiny_pipeline

DIFFUSIONS = {
    "sd": Diffusion("scaled_linear", "epsilon"),
    "zero snr": Diffusion("scaled_linear", "v_prediction", rescale_betas_zero_snr=True),
    "flow": Diffusion("flow", "flow_prediction"),
}


def student_of(folder: Path, diffusion: Diffusion, steps: int = 4) -> Path:
    """A folder of a tiny student; its network is random."""
    pipeline = tiny_pipeline(folder / "scratch", replace(diffusion, distilled_steps=steps))
    pipeline.save_pretrained(folder / "student")
    return folder / "student"
