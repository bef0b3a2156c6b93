"""What do faster ways to draw cost in quality? Time beside the distance from the exact images.

Exact is 50 steps of DPM-Solver++ 2M, guided everywhere, from the same noise. Of each way: CPU time
of all threads, the peak signal-to-noise ratio of each image to its exact one, and the kernel
distance of all to exact ones from other noise, in the features that `latentdiff eval` takes: it is
unbiased for independent sets alone. There is no CLIP score: the embedded model has no image tower.
Students are in docs/distill.md.

    OMP_NUM_THREADS=1 python benchmarks/approximate.py
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.evaluation.kernel import kernel_distance
from latentdiff.evaluation.looks import find_look
from latentdiff.pipeline import Pipeline

PROMPTS = ("a cat", "red heart", "a rose", "a house", "a dog", "pizza", "a sad face", "a red car")
GUIDANCE = 4.0
INTERVAL = (0.2, 5.0)
WAYS: dict[str, dict[str, Any]] = {
    "exact: dpmpp_2m, 50 steps": {"steps": 50},
    "interval 0.2 to 5": {"steps": 50, "guidance_interval": INTERVAL},
    "20 steps": {"steps": 20},
    "20 steps, interval 0.2 to 5": {"steps": 20, "guidance_interval": INTERVAL},
    "cache_interval 2": {"steps": 50, "cache_interval": 2},
    "cache_interval 3": {"steps": 50, "cache_interval": 3},
    "cache_interval 5": {"steps": 50, "cache_interval": 5},
    "20 steps, cache_interval 2": {"steps": 20, "cache_interval": 2},
    "20 steps of ddim": {"steps": 20, "sampler": "ddim"},
    "20 steps of unipc": {"steps": 20, "sampler": "unipc"},
    "10 steps": {"steps": 10},
    "10 steps of unipc": {"steps": 10, "sampler": "unipc"},
    "5 steps": {"steps": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--num_images", type=int, default=2, help="of each of the prompts")
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model, dtype="auto")
    pipe.batched = True
    look = find_look("network", whole=True).look
    print("| | CPU s/image | of the exact | dB, median | dB, lowest | kernel distance |")
    print("|---|---:|---:|---:|---:|---:|")
    others, _ = draw(pipe, arguments.num_images, {"steps": 50, "seed": 1000})
    features = look(others)
    exact: list[Image.Image] = []
    exact_seconds = 0.0
    for name, options in WAYS.items():
        images, seconds = draw(pipe, arguments.num_images, options)
        if not exact:
            exact, exact_seconds = images, seconds
        ratios = [decibels(*pair) for pair in zip(images, exact, strict=True)]
        print(
            f"| {name} | {seconds:.2f} | {seconds / exact_seconds:.2f} "
            f"| {statistics.median(ratios):.1f} | {min(ratios):.1f} "
            f"| {kernel_distance(look(images), features):.3f} |",
            flush=True,
        )


def draw(
    pipe: Pipeline, num_images: int, options: dict[str, Any]
) -> tuple[list[Image.Image], float]:
    """Images of every prompt, and the CPU seconds of one."""
    options = {"seed": 0, "sampler": "dpmpp_2m", "guidance_scale": GUIDANCE, **options}
    start = time.process_time()
    images = pipe(PROMPTS, num_images=num_images, progress=False, **options).images
    return images, (time.process_time() - start) / len(images)


def decibels(image: Image.Image, exact: Image.Image) -> float:
    """Peak signal-to-noise ratio."""
    error = np.mean(np.square(np.asarray(image, float) - np.asarray(exact, float)))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


if __name__ == "__main__":
    main()
