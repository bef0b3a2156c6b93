"""Which options make a run fit into memory that it does not fit into as it is configured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from latentdiff.models.unet import UNetConfig
from latentdiff.planning.footprint import Execution
from latentdiff.planning.settings import network_config, positive_int, with_options

RANK = 16


@dataclass(frozen=True)
class Fitting:
    """Options, by the names that they have in the scripts, and the peak with them in bytes."""

    options: Mapping[str, Any]
    peak: float
    fits: bool
    """Else the peak is the smallest that was found."""


def find_fitting(
    settings: Mapping[str, Any],
    execution: Execution,
    *,
    peak_of: Callable[[Mapping[str, Any]], float],
    limit: float,
    half: str | None,
) -> Fitting:
    """Options with which the run of these settings stays under the limit; it does not without.

    They are added in the order of `levers` until it fits, and each that it then fits without is
    taken out again, the last first. `peak_of(settings)` in bytes; `half` is the device's half
    precision.
    """
    options: dict[str, Any] = {}
    peak = float("inf")
    for name, value in levers(settings, execution, half=half).items():
        options[name] = value
        peak = peak_of(with_options(settings, options))
        if peak <= limit:
            break
    fits = peak <= limit
    for name in reversed(list(options)):
        without = {key: value for key, value in options.items() if key != name}
        if not without:
            break
        other = peak_of(with_options(settings, without))
        if other <= (limit if fits else peak):
            options, peak, fits = without, other, other <= limit
    if fits and (name := "gradient_accumulation_steps") in options:
        options[name], peak = _fewest(settings, options, execution, peak, peak_of, limit)
    return Fitting(options, peak, fits)


def levers(
    settings: Mapping[str, Any], execution: Execution, *, half: str | None
) -> dict[str, Any]:
    """What is not yet on and may save memory, that which costs least first.

    Micro-batches take the same step, gradient checkpointing takes it with more arithmetic, sharding
    with more messages; half precision and moments of eight bits round it; a LoRA changes what is
    trained.
    """
    several, sharded = execution.processes > 1, execution.sharding != "none"
    has_lora = settings.get("lora") is not None
    per_process = positive_int(settings, "batch_size") // execution.processes
    adamw = execution.optimizer == "adamw"
    candidates = (
        (
            "gradient_accumulation_steps",
            per_process,
            positive_int(settings, "gradient_accumulation_steps", 1) < per_process,
        ),
        ("gradient_checkpointing", True, not execution.gradient_checkpointing),
        ("sharding", "full", several and not sharded and not has_lora and adamw),
        ("mixed_precision", half, half is not None and execution.precision == "no"),
        ("optimizer", "adamw8bit", adamw and not several),
        ("lora.rank", RANK, _takes_lora(settings) and not has_lora and not several),
    )
    return {name: value for name, value, is_possible in candidates if is_possible}


def _takes_lora(settings: Mapping[str, Any]) -> bool:
    """Whether a LoRA of `RANK` can be trained of the model that the settings start from."""
    config = network_config(settings)[1]
    if settings.get("init") is None or not isinstance(config, UNetConfig):
        return False
    if settings.get("inpainting") and config.in_channels <= config.out_channels:
        return False  # nor can it add the channels of masks
    return min(config.cross_attention_dim, *config.block_out_channels) >= RANK


def _fewest(
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    execution: Execution,
    peak: float,
    peak_of: Callable[[Mapping[str, Any]], float],
    limit: float,
) -> tuple[int, float]:
    """The fewest micro-batches that fit, of which the most do, and the peak with them."""
    name = "gradient_accumulation_steps"
    per_process = positive_int(settings, "batch_size") // execution.processes
    now = positive_int(settings, name, 1)
    counts = [n for n in range(now + 1, per_process + 1) if per_process % n == 0]
    low, high = 0, len(counts) - 1  # the last is known to fit
    while low < high:
        middle = (low + high) // 2
        found = peak_of(with_options(settings, {**options, name: counts[middle]}))
        low, high = (low, middle) if found <= limit else (middle + 1, high)
        peak = found if found <= limit else peak
    return counts[high], peak
