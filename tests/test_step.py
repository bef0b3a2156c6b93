"""A training step asks the device for no number, for which the host would wait."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.scripts import run_here, script
from test_cache import vae
from test_in_memory import arguments
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff.data.shapes import build_shapes
from latentdiff.training.randomness import MicroBatch

READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal"}
"""What returns a number to Python, or a tensor whose shape depends on numbers."""

pytestmark = [
    pytest.mark.training,
    pytest.mark.filterwarnings("ignore:the VAE in .* is not fit"),  # it is untrained
]


class Reads(TorchDispatchMode):
    """Notes the operators that make the host wait for the device, on a CPU as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shapes, and a cache of them by an untrained VAE."""
    folder = tmp_path_factory.mktemp("home")
    build_shapes(folder / "data", count=40, seed=0, size=32)
    vae().save_pretrained(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        options = f"--data={folder}/data --image_size=32 --vae={folder}/vae --check_latents=false"
        run_here("cache_latents", *options.split(), f"--output_dir={folder}/cache")
        yield folder


def test_a_read_is_seen() -> None:
    with Reads() as reads:
        x = torch.ones(2)
        assert x.sum() > 1
        x[x > 0] = 3.0
        float(x.mean())
    assert len(reads.found) >= 2


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("train_unet", "adamw"),
        ("train_vae", "muon"),
        ("train_unet", "muon"),
        ("train_clip", "adamw"),
    ],
)
def test_a_step_reads_nothing_from_the_device(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, optimizer: str
) -> None:
    found: list[str] = []

    def two_steps(task: Any, loader: Any, run: Any) -> None:
        batches = loader(0)
        task.step(next(batches), 0, MicroBatch())  # which makes the optimizer's moments
        batch = next(batches)
        with Reads() as reads:
            task.step(batch, 1, MicroBatch())
        found.extend(reads.found)
        run.folder.close()

    monkeypatch.setattr(script(name), "fit", two_steps)
    options = {"optimizer": optimizer, "in_memory": "true"}
    run_here(name, *arguments(name, home, tmp_path / "run", **options))
    assert found == []
