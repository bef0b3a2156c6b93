"""The scripts on streamed data: trained, resumed and cached as on data with random access."""

import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from support.scripts import run_here
from test_end_to_end import NETWORKS, SHORT, TINY, log, untimed
from test_tar import add

from latentdiff.data.shapes import build_shapes
from latentdiff.formats.weights import load_safetensors

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    build_shapes(folder / "data", count=60, seed=0, size=64)
    source = folder / "data" / "train"
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    (folder / "tars").mkdir()
    for number in range(3):
        with tarfile.open(folder / "tars" / f"{number}.tar", "w") as tar:
            for row in rows[number::3]:
                add(tar, row["file_name"], (source / row["file_name"]).read_bytes())
                fields = {"text": row["text"], "text_zh": row["text_zh"]}
                add(tar, f"{Path(row['file_name']).stem}.json", json.dumps(fields).encode())
    return folder / "tars"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["train_clip", "train_vae"])
def test_training_on_a_stream_resumes_bit_for_bit(shapes: Path, tmp_path: Path, name: str) -> None:
    """From step 4 on, over the end of the first epoch, and with other workers."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    args = [*TINY[name].split(), *SHORT.split(), "--data", str(shapes), "--stream=true"]
    args += ["--image_size=32", "--shuffle_buffer=10", "--checkpoint_every=4"]
    args += ["--max_steps=8", "--preview_every=8"]
    if name == "train_vae":
        args.append("--random_flip=true")
    run_here(name, *args, "--output_dir", str(whole))
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-8")
    run_here(name, *args, "--output_dir", str(part), "--num_workers=2")
    assert untimed(log(part)) == untimed(log(whole))
    state = f"checkpoints/step-8/{NETWORKS[name]}.safetensors"
    found, expected = load_safetensors(part / state), load_safetensors(whole / state)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_a_stream_is_cached_as_a_set_is(shapes: Path, tmp_path: Path) -> None:
    """The same latents and captions, so that train_unet.py cannot tell one from the other."""
    args = ["--data", str(shapes), "--image_size=32", "--vae=emoji", "--chunk_size=20"]
    args += ["--crops=2", "--flip=true"]
    for stream in ("false", "true"):
        run_here(
            "cache_latents", *args, f"--stream={stream}", "--output_dir", str(tmp_path / stream)
        )
    names = [
        sorted(path.name for path in (tmp_path / stream).glob("*.npy"))
        for stream in ("false", "true")
    ]
    assert names[0] == names[1]
    assert len(names[0]) > 3
    for name in names[0]:
        one, other = (np.load(tmp_path / stream / name) for stream in ("false", "true"))
        assert np.array_equal(one, other)
    texts = [(tmp_path / stream / "samples.arrow").read_bytes() for stream in ("false", "true")]
    assert texts[0] == texts[1]


def test_a_stream_below_one_batch_is_refused(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*TINY["train_vae"].split(), *SHORT.split(), "--data", str(shapes), "--stream=true"]
    args += ["--image_size=32", "--batch_size=64", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="2"):
        run_here("train_vae", *args)
    assert "batch_size=64 must be at most 54, the number of samples" in capsys.readouterr().err
