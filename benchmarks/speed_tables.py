"""A table of variants that do the same work: gate, interleaved rounds, ratios to ours."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import Ceiling, interleave, ratio, seconds_of

SAME = 1e-4


@dataclass
class Variant:
    """One way to do the work of a table."""

    call: Callable[[], Any]
    """Does the work once, and returns what `error` looks at."""
    reference: bool = False
    """Whether the others are compared with what this returns, and it is not timed as a peer."""


@dataclass
class Table:
    """What is measured of several variants, of which `ours` is the one that the ratios are to."""

    name: str
    variants: Mapping[str, Variant]
    ours: str
    error: Callable[[Any, Any], float] | None = None
    """`error(found, reference)`: smaller is better; None where there is nothing to compare."""
    flop: float | None = None
    """Of one call."""
    images: int = 1
    """Of one call."""
    notes: dict[str, str] = field(default_factory=dict)
    """What was not run, and why."""


@dataclass(frozen=True)
class Row:
    """What was measured of a variant."""

    seconds: float
    spread: float
    """Between the quartiles of the rounds."""
    first: float
    """Seconds of the first call: compilation, conversion, caches."""
    ratio: tuple[float, float, float]
    """How many times as long as ours it takes, and the 95 % interval."""
    error: float | None


def measure(table: Table, *, rounds: int, device: torch.device) -> dict[str, Row]:
    """Time the variants of a table, after what they return has been compared."""
    found: dict[str, Any] = {}
    first: dict[str, float] = {}
    for name, variant in table.variants.items():

        def once(name: str = name, variant: Variant = variant) -> None:
            found[name] = variant.call()

        first[name] = seconds_of(once, device)
    errors = _errors(table, found)
    seconds = interleave(
        {name: variant.call for name, variant in table.variants.items()},
        rounds=rounds,
        device=device,
    )
    rows: dict[str, Row] = {}
    for name, times in seconds.items():
        low, _, high = statistics.quantiles(times, n=4)
        rows[name] = Row(
            statistics.median(times),
            high - low,
            first[name],
            ratio(times, seconds[table.ours]),
            errors.get(name),
        )
    return rows


def gate(table: Table, rows: Mapping[str, Row]) -> list[str]:
    """What is wrong with what was computed: ours must be as near to float32's as the peers' is.

    The peers in float32 must compute the same as ours, or other things are compared.
    """
    errors = {name: row.error for name, row in rows.items() if row.error is not None}
    if not errors:
        return []
    wrong = [
        f"{table.name}: {name} is {error:.1e} away from ours in float32, more than {SAME}"
        for name, error in errors.items()
        if name.endswith("float32") and error > SAME
    ]
    limit = 1.1 * max(error for name, error in errors.items() if not name.startswith("ours"))
    wrong += [
        f"{table.name}: {name} is {error:.1e} away from float32, the peers {limit / 1.1:.1e}"
        for name, error in errors.items()
        if name.startswith("ours") and error > max(limit, SAME)
    ]
    return wrong


def _errors(table: Table, found: Mapping[str, Any]) -> dict[str, float]:
    if table.error is None:
        return {}
    (reference,) = (name for name, variant in table.variants.items() if variant.reference)
    error = table.error
    return {name: error(one, found[reference]) for name, one in found.items() if name != reference}


def show(table: Table, rows: Mapping[str, Row], ceiling: Ceiling) -> None:
    """Print a table in Markdown."""
    print(f"\n{table.name}\n")
    print(
        "| | ms | quartiles apart | images/s | times ours | of the ceiling | error | first call |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        middle, low, high = row.ratio
        share = "–"
        if table.flop is not None:
            share = f"{table.flop / row.seconds / 1e9 / ceiling.product:.0%}"
        error = "–" if row.error is None else f"{row.error:.1e}"
        print(
            f"| {name} | {1e3 * row.seconds:.1f} | {1e3 * row.spread:.1f} "
            f"| {table.images / row.seconds:.2f} | {middle:.2f} ({low:.2f}–{high:.2f}) "
            f"| {share} | {error} | {row.first:.1f} s |"
        )
    for name, why in table.notes.items():
        print(f"| {name} | not run: {why} | | | | | | |")
    print(flush=True)
