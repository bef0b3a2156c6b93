"""`latentdiff ema`: synthesize an average of any length from a run's snapshots."""

import argparse
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.training.ema_synthesis import Snapshot


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "ema", help="average the weights of a run, over any length", allow_abbrev=False
    )
    parser.set_defaults(run=_ema, parser=parser)
    add = parser.add_argument
    add("folder", metavar="RUN", type=Path, help="a run folder of train_unet or train_clip")
    add("--list", action="store_true", help="show which snapshots there are, and end")
    add("--length", type=float, help="standard deviation of the average, as a fraction of the run")
    add("--step", type=int, help="at which the average ends; default: the last snapshot's")
    add("--out", metavar="FOLDER", type=Path, help="a new folder for the model")


def _ema(arguments: argparse.Namespace) -> None:
    from latentdiff.training.ema_synthesis import FILES, find_snapshots, synthesize, write_model

    run: Path = arguments.folder
    folders = sorted(path for path in run.glob("ema/*") if path.is_dir())
    if not folders:
        raise ValueError(
            f"RUN={run} has no snapshots in ema/; train with --ema_lengths '[0.05, 0.1]'"
        )
    snapshots_of = {folder.name: find_snapshots(folder) for folder in folders}
    if arguments.list:
        for name, snapshots in snapshots_of.items():
            _show(name, snapshots)
        return
    if arguments.length is None or arguments.out is None:
        raise ValueError("--length and --out are needed, or --list")
    names = [name for name in snapshots_of if name in FILES]
    if not names:
        raise ValueError(
            f"RUN={run} has snapshots of {', '.join(snapshots_of)} alone, whose averages cannot be "
            "saved: a VAE is saved with the statistics of its latents, which other weights change"
        )
    name, snapshots = names[0], snapshots_of[names[0]]
    synthesis = synthesize(snapshots, length=arguments.length, step=arguments.step)
    write_model(run / "model", arguments.out, FILES[name], synthesis)
    print(
        f"{name}: {len(synthesis.snapshots)} of {len(snapshots)} snapshots; the profile is missed "
        f"by {synthesis.error:.2%}"
    )
    print(arguments.out)


def _show(name: str, snapshots: "list[Snapshot]") -> None:
    """Print a line for each length of the snapshots."""
    for length, group in groupby(sorted(snapshots, key=lambda s: s.length), lambda s: s.length):
        same_length = list(group)
        steps = [snapshot.step for snapshot in same_length]
        size = sum(snapshot.path.stat().st_size for snapshot in same_length) / 1e6
        print(
            f"{name}: length {length:g}, {len(same_length)} snapshots from step {min(steps)} to "
            f"{max(steps)}, {size:,.1f} MB"
        )
