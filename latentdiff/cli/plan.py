"""`latentdiff plan`: what a training run would take, before it starts."""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.planning.devices import Device
    from latentdiff.planning.fitting import Fitting
    from latentdiff.planning.footprint import Execution
    from latentdiff.planning.plan import Plan

GIB = 2**30
MANY = 1_000_000  # images of a data set that is not there yet
COUNTS = (
    *("batch_size", "gradient_accumulation_steps", "image_size", "max_steps", "crops"),
    "snapshot_every",
)
FORMER_NAMES = {"pictures": "images", "accumulation": "gradient_accumulation_steps"}


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "plan", help="memory, time and disk of a training run", allow_abbrev=False
    )
    parser.set_defaults(run=_plan, parser=parser)
    add = parser.add_argument
    add("project", nargs="?", type=Path, metavar="PROJECT", help="of `new`: all its trainings")
    add(
        "--config",
        type=Path,
        help="of a training script or distill; or give PROJECT or --init",
    )
    add("--device", default="cpu", help="a GPU's name, such as a100-80gb; default: this CPU")
    add("--device_memory", type=float, metavar="GIB", help="of each process; default: the GPU's")
    add("--processes", type=int, default=1, help="of the full run, one per GPU; default: 1")
    add("--efficiency", type=float, default=0.4, help="fraction of the peak FLOP/s; default: 0.4")
    add("--images", type=int, metavar="N", help=f"in the data; default: the cache's, or {MANY:,}")
    for former, name in FORMER_NAMES.items():
        add(f"--{former}", type=_renamed(name), help=argparse.SUPPRESS)
    overrides = parser.add_argument_group("in place of what the configuration says")
    for name in COUNTS:
        overrides.add_argument(f"--{name}", type=int, metavar="N")
    overrides.add_argument("--mixed_precision", choices=("auto", "no", "bf16", "fp16"))
    overrides.add_argument("--sharding", choices=("none", "full", "zero1", "zero2"))
    _add_switch(overrides, "gradient_checkpointing")
    overrides.add_argument("--optimizer", choices=("adamw", "adamw8bit", "muon"))
    overrides.add_argument("--ema_lengths", type=float, nargs="+", metavar="SIGMA")
    _add_switch(overrides, "flip")
    overrides.add_argument("--init", help="a model to train from, or sd15 for SD 1.x's shapes")
    overrides.add_argument("--lora.rank", type=int, metavar="N", help="train a LoRA of init")
    for name in ("vae", "text_encoder"):
        overrides.add_argument(f"--{name}", help="a folder, emoji, or sd15 for SD 1.x's shapes")
    names = {action.dest for action in overrides._group_actions}
    parser.set_defaults(overrides=sorted(names))


def _add_switch(group: "argparse._ArgumentGroup", name: str) -> None:
    """--NAME, as here, --NAME true or false, as in the scripts, and --no-NAME."""
    words = {"true": True, "false": False}

    def truth(word: str) -> bool:
        if word not in words:
            raise argparse.ArgumentTypeError(f"{word!r} must be true or false")
        return words[word]

    group.add_argument(
        f"--{name}", nargs="?", const=True, type=truth, default=None, metavar="true|false"
    )
    group.add_argument(
        f"--no-{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS
    )


def _renamed(name: str) -> Callable[[str], str]:
    def refuse(_: str) -> str:
        raise argparse.ArgumentTypeError(f"it is named --{name} now")

    return refuse


def _plan(arguments: argparse.Namespace) -> None:
    from latentdiff.planning.devices import DEVICES, measure_cpu

    _check_numbers(arguments)
    configs = _configs(arguments)
    name: str = arguments.device
    if name != "cpu" and name not in DEVICES:
        raise ValueError(f"device={name!r} must be one of cpu, {', '.join(DEVICES)}")
    device = measure_cpu() if name == "cpu" else DEVICES[name]
    for number, config in enumerate(configs):
        if number:
            print()
        _plan_run(arguments, config, device)


def _configs(arguments: argparse.Namespace) -> list[Path | None]:
    """The configuration of each training to plan; None is that of --init alone."""
    if arguments.project is None:
        if arguments.config is None and arguments.init is None:
            raise ValueError(
                "give PROJECT, a folder of `latentdiff new`, --config, the configuration of a run, "
                "or --init, a model"
            )
        return [arguments.config]
    from latentdiff.projects.folder import MODULES, check_project

    for other in ("config", *arguments.overrides):
        if getattr(arguments, other) is not None:
            raise ValueError(
                f"--{other} is for one training; give --config {arguments.project}/unet.yaml, say, "
                "in place of PROJECT"
            )
    check_project(arguments.project)
    return [arguments.project / f"{module}.yaml" for module in MODULES if module != "cache"]


def _plan_run(arguments: argparse.Namespace, config: Path | None, device: "Device") -> None:
    from latentdiff.planning.plan import find_fitting_options, make_plan
    from latentdiff.planning.settings import num_cached, read_settings

    name = arguments.device
    overrides = {name: getattr(arguments, name) for name in arguments.overrides}
    settings = read_settings(config, overrides)
    memory = None if arguments.device_memory is None else arguments.device_memory * GIB
    images = arguments.images or num_cached(settings) or MANY
    run: dict[str, Any] = {"device": device, "gpu": name != "cpu"}
    run |= {"processes": arguments.processes, "images": images}
    plan = make_plan(settings, memory=memory, efficiency=arguments.efficiency, **run)
    fitting = find_fitting_options(settings, plan, **run)
    execution = plan.footprint.execution
    print(
        f"{plan.kind}: batch_size {settings['batch_size']} on {arguments.processes} × {name}, "
        f"micro-batches of {plan.micro_batch_size}, mixed precision {execution.precision}"
        f"{_modes(execution, settings)}"
    )
    speed = f"{_rate(plan.images_per_second)} at {arguments.efficiency:.0%} of "
    speed += f"{device.flops[execution.precision] / 1e12:.4g} TFLOP/s"
    for title, value in (
        *_arithmetic(plan),
        *_memory(plan, fitting, cpu=name == "cpu"),
        ("images per second", speed),
        *_time_and_disk(plan, settings, images=images),
    ):
        print(f"{title:<38}{value}".rstrip())


def _check_numbers(arguments: argparse.Namespace) -> None:
    memory, efficiency, images = arguments.device_memory, arguments.efficiency, arguments.images
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"device_memory={memory} must be a number of GiB above 0")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency={efficiency} must be above 0 and at most 1, the peak")
    if images is not None and images < 1:
        raise ValueError(f"images={images} must be at least 1")


def _modes(execution: "Execution", settings: Mapping[str, Any]) -> str:
    modes = ["gradient checkpointing"] if execution.gradient_checkpointing else []
    if settings.get("lora") is not None:
        modes.insert(0, f"LoRA of rank {settings['lora'].get('rank', 16)}")
    if settings.get("teacher") is not None:
        modes.insert(0, f"a student of {settings['teacher']}")
    if execution.optimizer == "adamw8bit":
        modes.append("adamw8bit")
    if execution.sharding != "none":
        modes.append(f"sharding {execution.sharding}")
    return "".join(f", {mode}" for mode in modes)


def _arithmetic(plan: "Plan") -> list[tuple[str, str]]:
    title = "parameters"
    if plan.footprint.averaged < plan.footprint.weights:
        title = "trained parameters"
    return [
        (title, f"{plan.footprint.num_parameters / 1e6:,.2f} M"),
        ("FLOP per image, forward", f"{plan.forward_flop / 1e9:,.2f} G"),
        ("FLOP per image, training", f"{plan.training_flop / 1e9:,.2f} G"),
    ]


def _memory(plan: "Plan", fitting: "Fitting | None", *, cpu: bool) -> Iterator[tuple[str, str]]:
    yield "memory of each process", ""
    sizes = {name: size for name, size in plan.resident.items() if size}
    sizes["activations"] = plan.footprint.activations
    sizes["peak of a step, with gradients"] = plan.footprint.step_peak
    for name, size in sizes.items():
        yield f"  {name}", _size(size)
    note = "with the heap's overhead, beside Python's own" if cpu else "of tensors"
    yield "  peak", f"{_size(plan.peak)} {note}"
    if plan.read_peak > plan.peak:
        yield "  before, while init is read", f"{_size(plan.read_peak)} in float32"
    if plan.memory_limit is None:
        return
    verdict = "fits" if plan.fits else "does NOT fit"
    largest = (
        "not even one image does"
        if plan.max_micro_batch_size == 0
        else f"the largest micro-batch is {plan.max_micro_batch_size}"
    )
    yield f"  {verdict}", f"in {_size(plan.memory_limit)}; {largest}{_advice(fitting)}"


def _advice(fitting: "Fitting | None") -> str:
    """What makes it fit, in the words of the scripts' command lines."""
    if fitting is None:
        return ""
    words = {True: "true", False: "false"}
    given = (f"--{name} {words.get(value, value)}" for name, value in fitting.options.items())
    if fitting.fits:
        return f"; it fits with {' '.join(given)}"
    if not fitting.options:
        return "; no option makes it smaller"
    return f"; no options make it fit: the least is {_size(fitting.peak)} with {' '.join(given)}"


def _time_and_disk(
    plan: "Plan", settings: Mapping[str, Any], *, images: int
) -> Iterator[tuple[str, str]]:
    steps = settings.get("max_steps")
    if steps is not None:
        seconds = steps * settings["batch_size"] / plan.images_per_second
        yield f"time of {steps:,} steps", _time(seconds)
    if plan.cache_bytes_per_image is not None:
        size = plan.cache_bytes_per_image * images / 1e9
        yield f"disk, latents of {images:,} images", f"{size:,.2f} GB"
    # A new checkpoint is complete before the oldest is deleted.
    count = settings.get("keep_checkpoints", 2) + 1
    size = plan.checkpoint_bytes / 1e9
    yield "disk, a checkpoint", f"{size:,.2f} GB; {count * size:,.2f} GB at most"
    if plan.snapshot_bytes:
        size = plan.snapshot_bytes / 1e9
        every = settings.get("snapshot_every", 500)
        total = "" if steps is None else f"; {-(-steps // every) * size:,.2f} GB in the end"
        yield f"disk, averages, each {every} steps", f"{size:,.2f} GB{total}"


def _size(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
