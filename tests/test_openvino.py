"""engine="openvino": the same images, networks kept on disk, and what it refuses."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.loras import kohya_file
from support.settings import WITH_BF16
from support.tiny import CONTEXT_DIM, randomise, tiny_pipeline

from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.pipeline import Pipeline

pytestmark = [
    pytest.mark.interchange,
    pytest.mark.skipif(
        find_spec("openvino") is None, reason='needs pip install "latentdiff[openvino]"'
    ),
]

CALL: dict[str, Any] = {"steps": 4, "seed": 0, "progress": False}
LONG = "a very long prompt of many more words than fit"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, which no test may write into."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(folder / "tokens").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def exact(model: Path) -> Pipeline:
    """In float32, for tests that do not change it; converted with shapes that no test asks for."""
    pipe = Pipeline.from_pretrained(model, engine="openvino", dtype=torch.float32)
    pipe("a cat", guidance_scale=1.0, height=26, width=10, **CALL)
    return pipe


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def decibels(images: list[Image.Image], references: list[Image.Image]) -> float:
    """The peak signal-to-noise ratio of the worst."""
    worst = 100.0
    for image, reference in zip(images, references, strict=True):
        assert image.size == reference.size
        error = np.mean((np.asarray(image, float) - np.asarray(reference, float)) ** 2)
        if error:
            worst = min(worst, 10 * float(np.log10(255**2 / error)))
    return worst


def agreement(pipe: Pipeline, reference: Pipeline, prompt: Any = "a cat", **options: Any) -> float:
    options = {**CALL, **options}
    return decibels(pipe(prompt, **options).images, reference(prompt, **options).images)


# --- the same images


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "dpmpp_2m"},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.5, 5.0)},
        {"negative_prompt": LONG, "prompt": LONG * 2},
        {"height": 12, "width": 24},
        {"height": 22},  # latents of an odd height
        {"prompt": ["a", "b"], "num_images": 2},
        {"image": True, "strength": 0.6},
        {"image": True, "mask_image": True},
        {"sampler": "euler_ancestral", "variation_strength": 0.3, "variation_seed": 5},
    ],
)
def test_images_are_those_of_torch(
    exact: Pipeline, reference: Pipeline, photo: Image.Image, options: dict[str, Any]
) -> None:
    options = {name: photo if value is True else value for name, value in options.items()}
    assert agreement(exact, reference, options.pop("prompt", "a cat"), **options) >= 60


@WITH_BF16
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_images_in_bfloat16_are_those_of_torch_but_for_its_rounding(
    model: Path, reference: Pipeline, sampler: str
) -> None:
    pipe = Pipeline.from_pretrained(model, engine="openvino", dtype=torch.bfloat16)
    assert agreement(pipe, reference, sampler=sampler, guidance_scale=2.0) >= 40


@WITH_BF16
def test_timesteps_are_not_rounded_to_bfloat16(model: Path, reference: Pipeline) -> None:
    """990 and 991 gave one output: OpenVINO rounds inputs as well, and these angles."""
    pipe = Pipeline.from_pretrained(model, engine="openvino", dtype=torch.bfloat16)
    x, context = torch.randn(1, 4, 8, 8), reference.encode("a cat")
    with torch.no_grad():
        ours, theirs = (
            [one.unet(x, torch.tensor([t]), context) for t in (990.0, 991.0)]
            for one in (pipe, reference)
        )
    assert not torch.equal(*ours)
    for output, exact_output in zip(ours, theirs, strict=True):
        torch.testing.assert_close(output, exact_output, rtol=0.05, atol=0.05)


def test_an_image_is_bit_for_bit_the_same_alone_and_among_others(exact: Pipeline) -> None:
    several = exact("a cat", num_images=3, **CALL).images
    alone = exact("a cat", **{**CALL, "seed": 2}).images[0]
    assert several[2].tobytes() == alone.tobytes()


def test_a_batch_draws_as_in_torch(exact: Pipeline, reference: Pipeline) -> None:
    """Not to the bit: OpenVINO's products add up in another order in a batch."""
    options: dict[str, Any] = {"prompt": ["a", "b"], "num_images": 2, "guidance_scale": 3.0}
    rows = []
    forward = exact.unet.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "batched", True)
        patch.setattr(exact.unet, "forward", lambda x, *a: rows.append(len(x)) or forward(x, *a))
        assert agreement(exact, reference, **options) >= 60
    assert rows == [4] * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_that_are_changed_in_place_are_seen(
    exact: Pipeline, reference: Pipeline, mode: Any
) -> None:
    """They stay bound while they are the same, and an earlier result stays as it was."""
    with mode():
        x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 12, 16)
        results = [exact.unet(x, t, context)]
        expected = [reference.unet(x, t, context)]
        context.mul_(-1)
        results.append(exact.unet(x, t, context))
        expected.append(reference.unet(x, t, context))
        assert exact.unet(x, t, context).equal(results[1])
    assert not expected[0].allclose(expected[1], atol=1e-2)
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)


def test_previews_are_those_of_torch(exact: Pipeline, reference: Pipeline) -> None:
    streams = [list(pipe.stream("a cat", steps=3, seed=0)) for pipe in (exact, reference)]
    assert len(streams[0]) == 3
    assert all(decibels(*images) >= 60 for images in zip(*streams, strict=True))


def test_an_inpainting_network_draws_as_in_torch(tmp_path: Path, photo: Image.Image) -> None:
    tiny_pipeline(tmp_path / "tokens", inpaints=True).save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, engine="openvino", dtype=torch.float32)
    reference = Pipeline.from_pretrained(tmp_path)
    assert agreement(pipe, reference, image=photo, mask_image=photo) >= 60


@pytest.mark.parametrize("attention", ["cross", "joint"])
def test_a_dit_draws_as_in_torch(tmp_path: Path, attention: Any) -> None:
    parts = tiny_pipeline(tmp_path / "tokens").components._asdict()
    config = DiTConfig(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=CONTEXT_DIM,
        attention=attention,
        pooled_text=True,
    )
    network = DiT(config)
    randomise(network)
    Pipeline(**{**parts, "unet": network.eval()}).save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, engine="openvino", dtype=torch.float32)
    reference = Pipeline.from_pretrained(tmp_path)
    assert agreement(pipe, reference) >= 60
    assert agreement(pipe, reference, LONG, height=24) >= 60


def test_a_single_file_draws_as_in_torch(reference: Pipeline, tmp_path: Path) -> None:
    reference.save_single_file(tmp_path / "one.safetensors")
    tokenizer = tmp_path / "tokenizer"
    reference.text_encoder.tokenizer.save_pretrained(tokenizer)
    pipe = Pipeline.from_single_file(
        tmp_path / "one.safetensors", tokenizer=tokenizer, engine="openvino", dtype=torch.float32
    )
    assert agreement(pipe, reference) >= 60
    assert (tmp_path / "one.openvino").is_dir()


# --- weights that change


def test_loras_change_images_as_in_torch(model: Path, tmp_path: Path) -> None:
    """Whatever is done with them after networks were converted; none is written to the disk."""
    pipe = Pipeline.from_pretrained(model, engine="openvino", dtype=torch.float32)
    other = Pipeline.from_pretrained(model)
    assert agreement(pipe, other) >= 60
    kept = entries(model)
    lora = kohya_file(tmp_path / "style.safetensors", other, alpha=2.0)
    images = [other("a cat", **CALL).images]
    for change in (
        lambda one: one.loras.load(lora, name="style"),
        lambda one: one.loras.set_scales({"style": 0.3}),
        lambda one: one.loras.unload(),
        lambda one: one.loras.load(lora, name="style", scale=0.5),
    ):
        change(pipe)
        change(other)
        assert agreement(pipe, other) >= 60
        images.append(other("a cat", **CALL).images)
    assert decibels(images[0], images[1]) < 40  # the LoRA does something
    assert decibels(images[1], images[2]) < 40  # and so does its scale
    assert entries(model) == kept
    for one in (pipe, other):
        one.loras.fuse()
    assert agreement(pipe, other) >= 60
    assert len(entries(model)) == len(kept) + 2


def entries(model: Path) -> set[str]:
    found = (path.name for path in (model / "openvino").iterdir())
    return {name for name in found if not name.startswith("compiled")}


def test_weights_that_are_changed_in_place_are_converted_anew(model: Path) -> None:
    pipe, other = (
        Pipeline.from_pretrained(model, engine="openvino", dtype=torch.float32),
        Pipeline.from_pretrained(model),
    )
    agreement(pipe, other)
    for one in (pipe, other):
        with torch.no_grad():
            one.unet.conv_out.weight.mul_(-1)
            one.vae.decoder.conv_out.weight.mul_(-1)
    assert agreement(pipe, other) >= 60


def test_what_is_saved_and_identified_is_the_model(
    exact: Pipeline, reference: Pipeline, tmp_path: Path
) -> None:
    exact("a cat", **CALL)
    assert exact.fingerprint() == reference.fingerprint()
    exact.save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path).fingerprint() == reference.fingerprint()
    assert not (tmp_path / "openvino").exists()
