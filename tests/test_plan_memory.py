"""The plan's peak of memory against what training really takes, in processes of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.settings import ANY, HALF, unet, vae

from latentdiff.planning.plan import make_plan

LORA = {"init": "emoji", "lora": {"rank": 4}, "batch_size": 1, "image_size": 64}
TINY = {"unet": unet(32, 4, 32, stages=3), "vae": vae(16, 4, 16, stages=3), "init": LORA}
CHECKPOINTING = {"gradient_checkpointing": True}
AVERAGES = {"ema_lengths": [0.05, 0.1]}
SIZES = [
    unet(64, 16, 64, stages=3),
    unet(64, 64, 64, stages=3),
    unet(64, 16, 128, HALF, stages=3),
    vae(32, 8, 64, stages=3),
    vae(32, 16, 64, stages=3),
    vae(32, 8, 128, HALF, stages=3),
    {**unet(64, 16, 64, stages=3), **CHECKPOINTING, **AVERAGES},
    {**unet(64, 16, 64, stages=3), **AVERAGES, "gradient_accumulation_steps": 2},
]
SD15 = {
    **{"init": "sd15", "lora": {"rank": 16}, "batch_size": 1},
    **{"image_size": 512 if HALF == "bf16" else 256, "mixed_precision": HALF, "steps": 2},
}
SHARED = [
    {**unet(64, 16, 64, stages=3), "sharding": "full"},
    {**unet(64, 16, 64, stages=3), "sharding": "full", **CHECKPOINTING, **AVERAGES},
]


def title(settings: dict[str, Any]) -> str:
    """What a test of these settings is called."""
    kind = kind_of(settings)
    shown = [str(settings[key]) for key in ("batch_size", "image_size", "mixed_precision")]
    return "-".join([kind, *shown, *(key for key in settings if key not in (*TINY[kind], kind))])


def kind_of(settings: dict[str, Any]) -> str:
    return next(kind for kind in TINY if kind in settings)


def measured(settings: dict[str, Any], count: int) -> list[int]:
    """What processes of their own take for it, with the heap as every user has it."""
    tiny = {**settings, **TINY[kind_of(settings)], "gradient_accumulation_steps": 1}
    tiny["mixed_precision"] = settings["mixed_precision"]
    tests = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["PYTHONPATH"] = f"{tests}:{tests.parent}"
    if count > 1:
        environment |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [
                sys.executable,
                str(tests / "support" / "peak_memory.py"),
                json.dumps(settings),
                json.dumps(tiny),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=environment | ({"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}),
        )
        for rank in map(str, range(count))
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    return [int(text) for text in printed]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def compare(settings: dict[str, Any], count: int = 1) -> None:
    """The peak is the largest of three runs at most: one that finds what libraries have freed takes
    less, by up to 8 % (579 to 625 MB in eight runs of one setting)."""
    plan = make_plan(settings, device=ANY, gpu=False, processes=count)
    found = 0
    for _ in range(3):
        found = max(found, *measured(settings, count))
        if plan.peak == pytest.approx(found, rel=0.15):
            break
    print(f"measured {found}, planned {plan.peak}; planned / measured {plan.peak / found:.3f}")
    assert plan.peak == pytest.approx(found, rel=0.15)


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")


@pytest.mark.processes
@ON_LINUX
@pytest.mark.parametrize("settings", SIZES, ids=title)
def test_the_peak_is_within_15_percent_of_what_training_takes(settings: dict[str, Any]) -> None:
    compare(settings)


@pytest.mark.processes
@ON_LINUX
@pytest.mark.parametrize("settings", SHARED, ids=title)
def test_so_it_is_where_two_processes_share_a_network(settings: dict[str, Any]) -> None:
    compare(settings, 2)


@pytest.mark.full_size
@pytest.mark.processes
@ON_LINUX
@pytest.mark.parametrize("checkpointing", [True, False])
def test_so_it_is_for_a_lora_of_sd_15(checkpointing: bool) -> None:
    """Two steps, at 512² in bf16: from the second on the moments are there as well."""
    compare({**SD15, "gradient_checkpointing": checkpointing})
