"""`latentdiff plan`: what a training run would take, before it starts."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.planning.footprint import Passes
    from latentdiff.planning.plan import Plan

GIB = 2**30
COUNTS = ("batch_size", "gradient_accumulation_steps", "image_size", "max_steps", "crops")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "plan", help="memory, time and disk of a training run", allow_abbrev=False
    )
    parser.set_defaults(run=_plan, parser=parser)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="of train_unet, train_vae or train_clip")
    add("--device", default="cpu", help="a GPU's name, such as a100-80gb; default: this CPU")
    add("--device_memory", type=float, metavar="GIB", help="of each process; default: the GPU's")
    add("--processes", type=int, default=1, help="of the whole run, one a GPU; default: 1")
    add("--efficiency", type=float, default=0.4, help="share of the peak FLOP/s; default: 0.4")
    add("--images", type=int, metavar="N", help="in the data set, for the latent cache")
    given = parser.add_argument_group("in place of what the configuration says")
    for name in COUNTS:
        given.add_argument(f"--{name}", type=int, metavar="N")
    given.add_argument("--mixed_precision", choices=("auto", "no", "bf16", "fp16"))
    given.add_argument("--sharding", choices=("none", "full", "zero1", "zero2"))
    given.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction)
    given.add_argument("--ema_lengths", type=float, nargs="+", metavar="SIGMA")
    given.add_argument("--flip", action=argparse.BooleanOptionalAction)
    for name in ("vae", "text_encoder"):
        given.add_argument(f"--{name}", help="a folder, emoji, or sd15 for SD 1.x's shapes")
    parser.set_defaults(overrides=[action.dest for action in given._group_actions])


def _plan(arguments: argparse.Namespace) -> None:
    from latentdiff.planning.devices import DEVICES, measure_cpu
    from latentdiff.planning.plan import make_plan, read_settings

    overrides = {name: getattr(arguments, name) for name in arguments.overrides}
    settings = read_settings(arguments.config, overrides)
    name: str = arguments.device
    if name != "cpu" and name not in DEVICES:
        raise ValueError(f"device={name!r} must be one of cpu, {', '.join(DEVICES)}")
    device = measure_cpu() if name == "cpu" else DEVICES[name]
    memory = None if arguments.device_memory is None else arguments.device_memory * GIB
    plan = make_plan(
        settings,
        device=device,
        gpu=name != "cpu",
        processes=arguments.processes,
        memory=memory,
        efficiency=arguments.efficiency,
    )
    peak = device.flops[plan.precision] / 1e12
    print(
        f"{plan.kind}: batch_size {settings['batch_size']} on {arguments.processes} × {name}, "
        f"{plan.parts} images at a time each, mixed precision {plan.precision}"
        f"{_ways(plan.footprint.passes)}"
    )
    for title, value in (*_counts(plan), *_memory(plan, cpu=name == "cpu")):
        print(f"{title:<38}{value}".rstrip())
    rate = plan.images_per_second
    share = f"{arguments.efficiency:.0%} of {peak:.4g} TFLOP/s"
    print(f"{'images a second':<38}{_rate(rate)} at {share}")
    steps = settings.get("max_steps")
    if steps is not None:
        seconds = steps * settings["batch_size"] / rate
        print(f"{f'time of {steps:,} steps':<38}{_time(seconds)}")
    if plan.cache_bytes is not None:
        count = 1_000_000 if arguments.images is None else arguments.images
        size = plan.cache_bytes * count / 1e9
        print(f"{f'disk, latents of {count:,} images':<38}{size:,.2f} GB")
    kept = settings.get("keep_checkpoints", 2)
    size = plan.checkpoint_bytes / 1e9
    # One more than are kept: a new one is whole before an old one goes.
    print(f"{'disk, a checkpoint':<38}{size:,.2f} GB; {(kept + 1) * size:,.2f} GB at most")
    if plan.snapshot_bytes:
        size = plan.snapshot_bytes / 1e9
        every = settings.get("snapshot_every", 500)
        count = "" if steps is None else f"; {-(-steps // every) * size:,.2f} GB in the end"
        print(f"{f'disk, averages, each {every} steps':<38}{size:,.2f} GB{count}")


def _ways(passes: "Passes") -> str:
    ways = ["gradient checkpointing"] if passes.gradient_checkpointing else []
    if passes.split != "none":
        ways.append(f"sharding {passes.split}")
    return "".join(f", {way}" for way in ways)


def _counts(plan: "Plan") -> list[tuple[str, str]]:
    return [
        ("parameters", f"{plan.footprint.parameters / 1e6:,.2f} M"),
        ("FLOP an image, forward", f"{plan.forward_flop / 1e9:,.2f} G"),
        ("FLOP an image, training", f"{plan.training_flop / 1e9:,.2f} G"),
    ]


def _memory(plan: "Plan", *, cpu: bool) -> list[tuple[str, str]]:
    gib = {name: size for name, size in plan.resident.items() if size}
    gib["kept for the backward pass"] = plan.footprint.activations
    gib["a step at its peak, with gradients"] = plan.footprint.step
    lines = [(f"  {name}", _size(size)) for name, size in gib.items()]
    note = "with the heap's losses, beside Python's own" if cpu else "of tensors"
    lines = [
        ("memory of each process", ""),
        *lines,
        ("  peak", f"{_size(plan.peak)} {note}"),
    ]
    if plan.limit is not None:
        verdict = "fits" if plan.peak <= plan.limit else "does NOT fit"
        most = (
            "not even one image does"
            if plan.largest == 0
            else (f"the most at a time is {plan.largest} images")
        )
        lines.append(("  " + verdict, f"in {_size(plan.limit)}; {most}"))
    return lines


def _size(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
