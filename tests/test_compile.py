"""pipe.compile(): the same images within rounding, changes that are seen, and what it refuses."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.loras import kohya_file
from support.tiny import CONTEXT_DIM, ONE_WIDTH, randomise, tiny_pipeline

from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.pipeline import Pipeline

CALL: dict[str, Any] = {"steps": 3, "seed": 0, "guidance_scale": 3.0, "progress": False}
VAE_OF_ONE_WIDTH = VAEConfig(
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=16,
    mid_block_add_attention=False,
)
NEW_SHAPE = r"compiling the (denoiser|VAE's decoder) for latents of"


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder, which no test may write into; and memory as it comes.

    In deterministic mode torch fills new memory, and compiled code with it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        yield
        torch.use_deterministic_algorithms(deterministic)


def small_pipeline(folder: Path) -> Pipeline:
    whole = tiny_pipeline(folder)
    torch.manual_seed(0)
    unet, vae = UNet(ONE_WIDTH).eval(), VAE(VAE_OF_ONE_WIDTH).eval()
    for network in (unet, vae):
        randomise(network)
    return Pipeline(unet=unet, vae=vae, text_encoder=whole.text_encoder, diffusion=whole.diffusion)


def pixels(pipe: Pipeline, prompt: str | list[str] = "a cat", **options: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe(prompt, **CALL | options).images])


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.square(found.astype(float) - expected).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.processes
def test_compiled_images_are_the_plain_ones_through_every_change(tmp_path: Path) -> None:
    """Of weights, LoRAs and precision, each of which the networks themselves keep as they were."""
    pipe = small_pipeline(tmp_path / "tokenizer")
    plain, state = pixels(pipe), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    assert pipe.compile(guidance_scale=3.0) is pipe
    with warnings.catch_warnings(action="error"):  # the shape is compiled
        assert decibels(pixels(pipe), plain) >= 40
    assert pipe.unet.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in pipe.unet.state_dict().items())
    with pytest.warns(UserWarning, match=NEW_SHAPE):
        styled = with_lora(pipe, tmp_path)
    pipe.loras.unload()
    fresh = small_pipeline(tmp_path / "other")
    assert decibels(styled, with_lora(fresh, tmp_path)) >= 40
    assert decibels(styled, plain) < 35
    with pytest.warns(UserWarning, match=NEW_SHAPE):
        assert decibels(pixels(pipe), plain) >= 40


def with_lora(pipe: Pipeline, folder: Path) -> np.ndarray:
    pipe.loras.load(kohya_file(folder / "style.safetensors", pipe, alpha=8.0))
    return pixels(pipe)


@pytest.mark.processes
def test_a_compiled_bfloat16_is_as_close_to_float32_as_a_plain_one(tmp_path: Path) -> None:
    exact = pixels(small_pipeline(tmp_path / "a"))
    plain = pixels(small_pipeline(tmp_path / "b").to(torch.bfloat16))
    pipe = small_pipeline(tmp_path / "c").compile(guidance_scale=3.0)
    with pytest.warns(UserWarning, match=NEW_SHAPE):  # what was compiled is float32
        found = pixels(pipe.to(torch.bfloat16))
    assert decibels(found, exact) >= decibels(plain, exact) - 3


@pytest.mark.processes
def test_images_beside_others_have_the_bytes_that_they_have_alone(tmp_path: Path) -> None:
    pipe = small_pipeline(tmp_path).to(torch.bfloat16).compile(guidance_scale=3.0, num_images=2)
    together = pixels(pipe, ["a cat", "a dog"])
    assert (together[1:] == pixels(pipe, "a dog", seed=1)).all()


@pytest.mark.processes
def test_another_size_without_guidance_of_a_dit_is_said_and_compiled(tmp_path: Path) -> None:
    pipe = small_pipeline(tmp_path)
    config = DiTConfig(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=CONTEXT_DIM,
    )
    torch.manual_seed(0)
    dit = DiT(config).eval()
    randomise(dit)
    pipe = Pipeline(
        unet=dit, vae=pipe.vae, text_encoder=pipe.text_encoder, diffusion=pipe.diffusion
    )
    options = {"height": 24, "width": 16, "guidance_scale": 1.0}
    plain = pixels(pipe, **options)
    pipe.compile()
    with pytest.warns(UserWarning, match=NEW_SHAPE):
        assert decibels(pixels(pipe, **options), plain) >= 40


def test_what_is_no_option_of_a_call_and_a_missing_compiler_are_refused(
    tmp_path: Path,
) -> None:
    pipe = small_pipeline(tmp_path)
    with pytest.raises(TypeError, match="there is no option 'heigth'; give height"):
        pipe.compile(heigth=64)
    with pytest.raises(ValueError, match="height=0 must be"):
        pipe.compile(height=0)
    from torch._inductor import config  # importing it takes seconds

    missing = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(ValueError, match=r"compile: torch makes C\+\+ .* install g\+\+"):
        pipe.compile()
    assert pipe.compiled is None


SECOND = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.append("tests")
from pathlib import Path
from test_compile import small_pipeline
small_pipeline(Path(sys.argv[1])).compile(guidance_scale=3.0)
"""


@pytest.mark.processes
def test_a_second_process_finds_the_machine_code_on_disk(tmp_path: Path) -> None:
    def libraries_after_a_process() -> dict[Path, float]:
        subprocess.run(
            [sys.executable, "-c", SECOND, str(tmp_path / "tokenizer")],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
            check=True,
        )
        return {path: path.stat().st_mtime for path in (tmp_path / "cache").rglob("*.so")}

    first = libraries_after_a_process()
    assert first
    assert libraries_after_a_process() == first
