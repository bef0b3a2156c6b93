"""Whether a run is compiled, and what accelerate's own variables and options come to."""

import re
import subprocess
from pathlib import Path
from typing import Literal

import accelerate
import pytest
import torch
from support.scripts import LAUNCH, ROOT

from latentdiff.models.precision import computes_bf16
from latentdiff.training.accelerator import (
    MIN_COMPILED_STEPS,
    ComputeConfig,
    ParallelConfig,
    Sharding,
    check_environment,
    choose_precision,
    decide_compile,
    make_accelerator,
)


def compiles(
    compiled: bool | Literal["auto"],
    *,
    precision: str = "bf16",
    max_steps: int = MIN_COMPILED_STEPS,
    sharding: Sharding = "none",
    num_sizes: int = 1,
) -> bool | str:
    compute, parallel = ComputeConfig(compile=compiled), ParallelConfig(sharding=sharding)
    return decide_compile(
        compute, parallel, precision=precision, max_steps=max_steps, num_sizes=num_sizes
    )


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")  # anything that is installed


def test_long_runs_in_bf16_are_compiled_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert compiles("auto")
    monkeypatch.setenv("CXX", "sh -c")
    assert compiles("auto")
    assert not compiles("auto", max_steps=MIN_COMPILED_STEPS - 1)
    assert not compiles("auto", num_sizes=2)
    assert not compiles("auto", sharding="full")
    assert not compiles("auto", precision="no")
    monkeypatch.setenv("CXX", str(Path("no") / "such" / "compiler"))
    assert not compiles("auto")


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_asked_for_is_done(precision: str, *, compiled: bool) -> None:
    assert compiles(compiled, precision=precision, max_steps=1) == compiled


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps"),
        ("USE_FSDP", "true", "--sharding full"),
        ("USE_DEEPSPEED", "1", "--sharding zero2"),
        ("USE_MEGATRON_LM", "true", "--sharding full"),
        ("USE_PARALLELISM_CONFIG", "true", "--sharding full"),
        ("DYNAMO_BACKEND", "INDUCTOR", "--compile true"),
        ("MIXED_PRECISION", "fp8", "--mixed_precision"),
    ],
)
def test_what_a_script_has_an_option_for_is_not_accelerates(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, ours: str
) -> None:
    """ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 quartered the gradients, and nobody was told."""
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    message = rf"^ACCELERATE_{name}={value} must be \w+: .*; give the script {ours} in its place$"
    with pytest.raises(ValueError, match=message):
        make_accelerator(ComputeConfig(), ParallelConfig())
    with pytest.raises(ValueError, match=message):
        check_environment()


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("option", "ours"),
    [
        ("--gradient_accumulation_steps=4", "--gradient_accumulation_steps"),
        ("--gradient-clipping=1.0", "--max_grad_norm"),
    ],
)
def test_what_accelerate_launch_drops_is_refused(tmp_path: Path, option: str, ours: str) -> None:
    """It did nothing, unsaid: accelerate gives it to DeepSpeed alone."""
    own = ["train/train_vae.py", f"--output_dir={tmp_path}", "--gradient_accumulation_steps=2"]
    command = [*LAUNCH[:-1], option, "--num_processes=1", *own]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    name = option.removeprefix("--").partition("=")[0].replace("-", "_")
    message = f"error: accelerate launch --{name} does not reach the script; give {ours}"
    assert message in done.stderr


def test_what_accelerate_launch_sets_by_itself_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default"}
    given |= {"USE_FSDP": "False", "GRADIENT_ACCUMULATION_STEPS": "1", "USE_CPU": "True"}
    for name, value in given.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_environment()


@pytest.mark.parametrize(
    ("wanted", "asked", "precision"),
    [
        ("auto", "bf16", "bf16"),  # it was overruled by "no", as in diffusers' scripts once
        ("no", "bf16", "no"),
        ("bf16", "no", "bf16"),
        ("auto", "no", "bf16" if computes_bf16(torch.device("cpu")) else "no"),
    ],
)
def test_accelerates_precision_is_that_of_auto(
    monkeypatch: pytest.MonkeyPatch, wanted: str, asked: str, precision: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert choose_precision(wanted, torch.device("cpu")) == precision


@pytest.mark.parametrize("wanted", ["fp16", "auto"])
def test_fp16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """accelerate computed in float32 there, while log and config.yaml said fp16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"^mixed_precision=fp16 must be bf16 or no on a CPU"):
        choose_precision(wanted, torch.device("cpu"))


def test_every_variable_of_accelerate_is_in_the_documents() -> None:
    """One that a new version reads should be looked at: is it refused, honoured, or no matter?"""
    folder = Path(accelerate.__file__).parent
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    found = set[str]()
    for path in folder.rglob("*.py"):
        if not path.is_relative_to(folder / "test_utils"):
            found |= set(re.findall(r"ACCELERATE_[A-Z0-9_]+", path.read_text("utf-8")))
    assert len(found) > 30
    told = set(re.findall(r"`([A-Z0-9_*]+)`", text))
    wild = tuple(name.removesuffix("*") for name in told if name.endswith("*"))
    names = {name.removeprefix("ACCELERATE_") for name in found} - {"", "DYNAMO_"}  # prefixes
    assert {name for name in names if name not in told and not name.startswith(wild)} == set()
