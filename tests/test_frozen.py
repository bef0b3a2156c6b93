"""Which VAE and text encoder a script takes where none is given: the embedded ones, or none."""

import json
from pathlib import Path

import datasets
import pytest
from support.scripts import run_here
from support.tiny import tiny_text_encoder
from test_cache import vae, write_images

from latentdiff.formats.diffusers import find_component
from latentdiff.tasks.frozen import frozen_component


def test_the_embedded_one_is_for_the_shapes_and_is_said(tmp_path: Path) -> None:
    """The emoji's was taken for any data, and nobody was told."""
    said: list[str] = []
    for component in ("vae", "text_encoder"):
        embedded = find_component("emoji", component)
        assert frozen_component(component, None, data="shapes", say=said.append) == embedded
        assert said.pop() == f"chosen: --{component} emoji, the embedded model's"
        for data in ("shapes", "runs/mine", None):
            assert frozen_component(component, "emoji", data=data, say=said.append) == embedded
    for data, whose in (("runs/mine", "data=runs/mine"), (None, "the cache is older and does not")):
        with pytest.raises(ValueError, match=f"^vae must be given: {whose}.*or --vae emoji where"):
            frozen_component("vae", None, data=data, say=said.append)
    assert said == []


TINY = (
    "--unet.block_out_channels=[8,16] --unet.norm_num_groups=4 --unet.attention_head_dim=2 "
    "--unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] --max_steps=1 --batch_size=4 "
    "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D] --mixed_precision=no"
)


@pytest.mark.training
@pytest.mark.filterwarnings("ignore:the VAE in .* is not fit to train on")  # it is random
def test_a_run_says_that_the_data_of_its_cache_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captions that were edited after the cache was made were trained on as they had been."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_images(tmp_path / "set", 8)
    vae().save_pretrained(tmp_path / "vae")
    tiny_text_encoder(tmp_path / "tokens").save_pretrained(tmp_path / "text")
    cached = [f"--data={tmp_path / 'set'}", "--image_size=16", f"--output_dir={tmp_path / 'cache'}"]
    cached += [f"--vae={tmp_path / 'vae'}", "--upscale_limit=4", "--check_latents=false"]
    unet = [*TINY.split(), f"--cache={tmp_path / 'cache'}", f"--vae={tmp_path / 'vae'}"]
    unet.append(f"--text_encoder={tmp_path / 'text'}")

    def train(name: str) -> str:
        capsys.readouterr()
        run_here("train_unet", *unet, f"--output_dir={tmp_path / name}")
        return capsys.readouterr().out

    run_here("cache_latents", *cached)
    assert "has changed" not in train("before")
    path = tmp_path / "set" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0]["text"] = "a cat"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = train("stale")
    assert f"data={tmp_path / 'set'} has changed since {tmp_path / 'cache'} was made of it" in said
    assert "no validation: val_fraction=0.01 of 8 images is not one" in said
    run_here("cache_latents", *cached)
    assert "the captions of 1 of 8 images have changed, no image has" in capsys.readouterr().out
    assert "has changed" not in train("after")
