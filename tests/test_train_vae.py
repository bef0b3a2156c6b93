"""What train_vae.py does to its pictures, and its discriminator beside it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, script
from torch import Tensor

from latentdiff.data.shapes import build_shapes
from latentdiff.training.checkpoint import Stored
from latentdiff.training.config import run_script
from latentdiff.training.randomness import Share, generator


def test_about_half_of_the_pictures_are_mirrored_whoever_works_on_them() -> None:
    images = torch.rand(64, 3, 2, 4)
    places = torch.rand(64, generator=generator(0, 5, "flip"))
    mirror = script("train_vae").mirror
    found = mirror(images, places)
    turned = [not torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    assert 20 < sum(turned) < 44
    for before, after, was_turned in zip(images, found, turned, strict=True):
        assert torch.equal(after, before.flip(-1) if was_turned else before)
    parts = [Share(index, 4) for index in range(4)]
    alone = [mirror(part.rows(images), part.rows(places)) for part in parts]
    assert torch.equal(torch.cat(alone), found)


NETWORK = "--vae.block_out_channels=[8,16] --vae.norm_num_groups=4 --vae.layers_per_block=1"
SHORT = "--image_size=32 --batch_size=4 --warmup_steps=1 --cooldown_steps=0 --max_steps=4"
REST = "--log_every=1 --checkpoint_every=2 --mixed_precision=no --disc_weight=0.5 --disc_start=1"
ARGUMENTS = f"{NETWORK} {SHORT} {REST}".split()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "data"
    build_shapes(folder, count=20, seed=0, size=32)
    return folder


def train(pictures: Path, run: Path, *more: str) -> list[dict[str, float]]:
    """Run the script in this process; its log."""
    args = ["train_vae.py", *ARGUMENTS, f"--data={pictures}", f"--output_dir={run}", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", args)
        run_script(script("train_vae").main)
    return log(run)


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path, step: int, name: str) -> dict[str, Tensor]:
    stored = Stored(run / "checkpoints" / f"step-{step}", name)
    return {key: tensor for key, tensor in stored.items() if key.startswith("model.")}


@pytest.mark.slow
def test_a_vae_with_its_discriminator_resumes_bit_for_bit(pictures: Path, tmp_path: Path) -> None:
    records = train(pictures, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-4")
    again = train(pictures, tmp_path / "part")
    for name in ("vae", "discriminator"):
        found, expected = (
            dict(Stored(tmp_path / run / "checkpoints" / "step-4", name))
            for run in ("part", "whole")
        )
        assert {k: t.equal(expected[k]) for k, t in found.items()} == dict.fromkeys(expected, True)
        assert any(key.startswith("ema.") for key in expected) == (name == "vae")
    assert [r["disc_loss"] for r in again[1:]] == [r["disc_loss"] for r in records[1:]]
    assert "disc_loss" not in records[0]  # which begins after a step
    assert all(key in records[1] for key in ("adversarial", "grad_norm_disc", "disc_real"))


@pytest.mark.slow
def test_neither_step_takes_the_others_gradients(pictures: Path, tmp_path: Path) -> None:
    """As both do in diffusers' script for autoencoders once its discriminator has started.

    However much the VAE minds its scores, the discriminator's first step is the same; and where it
    minds them by nothing that counts, its own first step is that without a discriminator.
    """
    after = {}
    for disc_weight in ("0", "1e-30", "0.5"):
        run = tmp_path / disc_weight
        options = [f"--disc_weight={disc_weight}", "--disc_start=0", "--max_steps=1"]
        train(pictures, run, *options)
        names = ("vae",) if disc_weight == "0" else ("vae", "discriminator")
        after[disc_weight] = {name: weights(run, 1, name) for name in names}

    def same(name: str, one: str, other: str) -> bool:
        pairs = zip(after[one][name].values(), after[other][name].values(), strict=True)
        return all(a.equal(b) for a, b in pairs)

    assert same("discriminator", "1e-30", "0.5")
    assert same("vae", "0", "1e-30")
    assert not same("vae", "0", "0.5")


@pytest.mark.slow
def test_two_processes_train_both_as_one_does(pictures: Path, tmp_path: Path) -> None:
    alone = train(pictures, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "train" / "train_vae.py"), *ARGUMENTS, f"--data={pictures}"]
    path = os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, f"--output_dir={tmp_path / 'two'}"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        },
    )
    assert done.returncode == 0, done.stderr
    for found, expected in zip(log(tmp_path / "two"), alone, strict=True):
        for name in found.keys() - {"samples_per_second", "data_wait", "memory"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"disc_weight": -1.0}, "disc_weight=-1.0 must not be negative"),
        ({"disc_weight": 0.5, "accumulation": 2}, "accumulation=2 must be 1 with a disc_weight"),
        ({"disc_weight": 0.5, "sharding": "full"}, "sharding='full' must be 'none' with a"),
    ],
)
def test_what_a_discriminator_cannot_be_trained_with_is_refused(option, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script("train_vae").TrainVAE(**option)
