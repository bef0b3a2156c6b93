"""How much of a bare training step's throughput is left in the training loop?

Runs train/train_unet.py as it is, with a configuration of `configs/` on made-up images, and in
turn with the loop, block by block in the same process, the shortest torch code of the same step:
the same network, text encoder, batch size and precision, a batch that is in memory already,
forward, backward, clipping, fused AdamW, average of the weights. Taking turns makes it fair on a
machine whose speed changes.

A block of the loop is timed from the moment at which it asks for a batch to that at which it asks
for the first of the next block: reading data, signals, metrics, progress bar and log are in it (a
log every 20 steps). Previews, validation and checkpoints are not, as they are not in the loop's own
`samples_per_second`. Prints a line of JSON for each configuration; `throughput` is the loop's
share of the bare step's, `data_wait` the share of the loop's time that reading took.

    python benchmarks/loop_overhead.py --blocks 6 --steps 20
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.scripts import ROOT, script

from latentdiff.formats.diffusers import find_component
from latentdiff.models.text import TextEncoder
from latentdiff.models.vae import Posterior
from latentdiff.training.loop import fit

SIZES = {"shapes": 32, "emoji": 64}  # of images, in pixels
IMAGES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--configs", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--blocks", type=int, default=6, help="of the loop, and as many bare ones")
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.configs:
        with tempfile.TemporaryDirectory() as home:
            draw_images(Path(home) / "data", SIZES[name])
            turns = Turns(arguments.blocks, arguments.steps)
            turns.train(name, Path(home))
        print(json.dumps({"config": name, "threads": arguments.threads} | turns.record()))


class Turns:
    """The loop and the bare step, one after the other, a block each."""

    def __init__(self, blocks: int, steps: int) -> None:
        self.blocks, self.steps = blocks, steps
        self.loop: list[float] = []
        self.bare: list[float] = []
        """Seconds of each block."""
        self.waited = 0.0

    def train(self, name: str, home: Path) -> None:
        """Run the script; the first block of each kind is not counted, nor the loop's last step."""
        options = {
            "config": ROOT / "configs" / name / "unet.yaml",
            "data": home / "data",
            "output_dir": home / "run",
            "image_size": SIZES[name],
            "cache": "null",
            "vae": "emoji",
            "text_encoder": "emoji",
            "max_steps": (self.blocks + 1) * self.steps + 1,
            "cooldown_steps": 0,
        }
        train_unet = script("train_unet")
        train_unet.fit = self.fit
        sys.argv = ["train_unet", *(f"--{key}={value}" for key, value in options.items())]
        train_unet.main()

    def fit(self, task: Any, loader: Any, run: Any) -> None:
        """`fit` with turns; of what it does at intervals only the log is left."""
        task.validate, task.preview = dict, lambda path: None
        bare = bare_step(task.learner, task.config, next(loader(0)))

        def turns(start: int) -> Iterator[Any]:
            batches = loader(start)
            for _ in range(self.blocks + 1):
                waited, begun = 0.0, time.perf_counter()
                for _ in range(self.steps):
                    asked = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - asked
                    yield batch
                ended = time.perf_counter()
                for _ in range(self.steps):
                    bare()
                self.bare.append(time.perf_counter() - ended)
                self.loop.append(ended - begun)
                self.waited += waited if len(self.loop) > 1 else 0.0
            yield next(batches)

        fit(task, turns, run)

    def record(self) -> dict[str, Any]:
        """What was measured."""
        loop, bare = self.loop[1:], self.bare[1:]
        ratios = [b / a for a, b in zip(loop, bare, strict=True)]
        return {
            "blocks": len(loop),
            "steps": self.steps,
            "ms_a_step_in_the_loop": round(1000 * sum(loop) / len(loop) / self.steps, 2),
            "ms_a_bare_step": round(1000 * sum(bare) / len(bare) / self.steps, 2),
            "throughput": round(sum(bare) / sum(loop), 4),
            "throughput_median": round(statistics.median(ratios), 4),
            "data_wait": round(self.waited / sum(loop), 4),
        }


def bare_step(learner: Any, config: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """The step of train_unet.py without anything around it, on a copy of the network."""
    network = copy.deepcopy(learner.model)
    average = copy.deepcopy(network).requires_grad_(False)
    weights, averages = list(network.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(
        weights,
        lr=config.optimizer.learning_rate,
        betas=(0.9, config.optimizer.beta2),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    text_encoder = TextEncoder.from_pretrained(find_component("emoji", "text_encoder"))
    posterior = Posterior.from_moments(batch["moments"])
    ids = batch["input_ids"]
    bf16 = learner.accelerator.mixed_precision == "bf16"
    draw = torch.Generator().manual_seed(0)

    def step() -> None:
        x0 = posterior.sample(torch.randn(posterior.mean.shape, generator=draw))
        noise = torch.randn(x0.shape, generator=draw)
        t = config.loss.sample_t(config.diffusion, len(x0), generator=draw)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            context = text_encoder.states(ids)
            loss = config.diffusion.loss(network, x0, context, noise=noise, t=t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage] # as in Learner
            averages, weights, 1.0 - config.ema.ema_decay
        )

    return step


def draw_images(folder: Path, size: int) -> None:
    """Images of noise with captions."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i in range(IMAGES):
            pixels = numbers.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            metadata.write(json.dumps({"file_name": f"{i}.png", "text": f"image {i}"}) + "\n")


if __name__ == "__main__":
    main()
