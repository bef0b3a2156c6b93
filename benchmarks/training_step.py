"""How fast is a UNet's training step, beside the machine's own ceiling and diffusers' UNet?

Each variant has the same shape, batch and loop: bf16 autocast, the flow's squared error, gradients
clipped, AdamW and an average of the weights. Rounds are interleaved, and of each variant the median
is printed; the ceiling is that of bf16 products and convolutions in the same run. Nothing else may
run on the machine.

    python benchmarks/training_step.py --config configs/emoji/unet.yaml --batch_size 64
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.options import compose
from latentdiff.training.accelerator import ComputeConfig
from latentdiff.training.ema import EMAConfig
from latentdiff.training.learner import Learner
from latentdiff.training.optimizer import OptimizerConfig

TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True, help="of train_unet.py")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--latent_channels", type=int, default=16)
    parser.add_argument("--latent_side", type=int, default=8)
    parser.add_argument("--context_width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    channels, side = arguments.latent_channels, arguments.latent_side
    options = yaml.safe_load(arguments.config.read_text())["unet"]
    options |= {"in_channels": channels, "out_channels": channels, "sample_size": side}
    config = compose(UNetConfig, options | {"cross_attention_dim": arguments.context_width})
    torch.manual_seed(0)
    batch = (
        torch.randn(arguments.batch_size, channels, side, side),
        1000 * torch.rand(arguments.batch_size),
        torch.randn(arguments.batch_size, TOKENS, arguments.context_width),
    )
    products, convolutions = ceiling()
    print(f"ceiling in bf16: products {products:.0f}, convolutions {convolutions:.0f} GFLOP/s")
    flop = count_flop(UNet(config), batch)
    print(f"{flop / arguments.batch_size / 1e9:.2f} GFLOP an image, forward and backward")
    table = [
        "| | ms a step | images/s | GFLOP/s | of the ceiling of products |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, median in medians(config, batch, rounds=arguments.rounds).items():
        rate, gflop = arguments.batch_size / median, flop / median / 1e9
        table.append(
            f"| {name} | {1e3 * median:.0f} | {rate:.1f} | {gflop:.0f} | {gflop / products:.0%} |"
        )
    print("\n".join(table))


def medians(config: UNetConfig, batch: tuple[Tensor, ...], *, rounds: int) -> dict[str, float]:
    """The median seconds of a step of each variant."""
    steps = {
        "diffusers": step_of(theirs(config), batch),
        "diffusers, compiled": step_of(theirs(config), batch, whole=True),
        "ours": step_of(UNet(config), batch),
        "ours, compiled": step_of(UNet(config), batch, compiled=True),
        "ours, compiled, Muon": step_of(UNet(config), batch, compiled=True, optimizer="muon"),
    }
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        print(f"{name}: first step {time.perf_counter() - start:.1f} s")
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def ceiling() -> tuple[float, float]:
    """The best rates of bf16 products and of 3×3 convolutions in channels_last, in GFLOP/s."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    x = torch.randn(128, 256, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3).bfloat16()
    weight = weight.to(memory_format=torch.channels_last)
    return (
        2 * 2048**3 / best(lambda: a @ a) / 1e9,
        2 * x.numel() * 256 * 9 / best(lambda: F.conv2d(x, weight, padding=1)) / 1e9,
    )


def best(function: Callable[[], Tensor]) -> float:
    """The least seconds of ten calls."""
    times: list[float] = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


class Theirs(nn.Module):
    """diffusers' UNet, called as ours is."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B, L, D) -> (B, C, H, W)."""
        return self.unet(x, timestep, context, return_dict=False)[0]


def theirs(config: UNetConfig) -> nn.Module:
    """diffusers' UNet of the same shape."""
    return Theirs(UNet2DConditionModel.from_config(config.to_dict()))


def count_flop(network: nn.Module, batch: tuple[Tensor, ...]) -> int:
    """The FLOP of a step's products and convolutions, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        network(*batch).square().mean().backward()
    return counter.get_total_flops()


def step_of(
    network: nn.Module,
    batch: tuple[Tensor, ...],
    *,
    whole: bool = False,
    compiled: bool = False,
    optimizer: Any = "adamw",
) -> Callable[[], None]:
    """A training step; `whole` compiles the network in one piece, `compiled` as our scripts do."""
    learner = Learner(
        network,
        Accelerator(cpu=True, mixed_precision="bf16"),
        optimizer=OptimizerConfig(optimizer=optimizer),
        max_steps=1000,
        ema=EMAConfig(),
        compute=ComputeConfig(compile=compiled),
    )
    if whole:
        learner.model.compile(dynamic=False)
    target = torch.randn_like(batch[0])

    def step() -> None:
        learner.update((learner.forward_model(*batch).float() - target).square().mean())

    return step


if __name__ == "__main__":
    main()
