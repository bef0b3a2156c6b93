"""What a precision cannot hold is refused wherever weights are written or converted, never lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.loras import ATTENTION, in_peft_names, random_lora
from support.tiny import tiny_pipeline

from latentdiff.cli import main
from latentdiff.formats.header import read_header
from latentdiff.formats.pickle import convert_pickle
from latentdiff.formats.weights import load_safetensors, save_safetensors
from latentdiff.pipeline import Pipeline
from latentdiff.training.ema_synthesis import Synthesis, find_snapshots, save_snapshot, write_model

STEM = "diffusion_pytorch_model"
PARTS = {
    "unet": f"unet/{STEM}.safetensors",
    "vae": f"vae/{STEM}.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
LARGE = 70_000.0  # float16 ends at 65,504


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return tiny_pipeline(tmp_path / "tokens")


def enlarge(pipeline: Pipeline, part: str, number: float = LARGE) -> None:
    network = getattr(pipeline, part)
    with torch.no_grad():
        next(iter(network.parameters())).flatten()[0] = number


Write = Callable[[Pipeline, Path], object]
WRITERS: dict[str, Write] = {
    "folder": lambda pipe, path: pipe.save_pretrained(path, dtype=torch.float16),
    "single file": lambda pipe, path: pipe.save_single_file(
        path.with_suffix(".safetensors"), dtype=torch.float16
    ),
    "in memory": lambda pipe, path: pipe.to(torch.float16),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("writer", ["folder", "single file", "in memory"])
def test_weights_above_float16_are_refused_by_name_and_nothing_is_written(
    pipeline: Pipeline, tmp_path: Path, part: str, writer: str
) -> None:
    """They became infinite, with exit code 0, in files that our own loader then refused."""
    enlarge(pipeline, part)
    with pytest.raises(
        ValueError, match=r"tensor .* is too large for torch\.float16: it holds 70000.*bfloat16"
    ) as refusal:
        WRITERS[writer](pipeline, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert pipeline.dtype == torch.float32


@pytest.mark.parametrize("part", PARTS)
def test_a_network_alone_is_refused_like_a_pipeline(
    pipeline: Pipeline, tmp_path: Path, part: str
) -> None:
    enlarge(pipeline, part)
    with pytest.raises(ValueError, match=r"be written: tensor .* too large for torch\.float16"):
        getattr(pipeline, part).save_pretrained(tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("writer", ["folder", "single file"])
def test_weights_that_no_reader_takes_are_not_written_in_any_precision(
    pipeline: Pipeline, tmp_path: Path, writer: str, number: float
) -> None:
    enlarge(pipeline, "vae", number)
    with pytest.raises(ValueError, match=r"cannot be written: tensor .* holds NaN or infinite"):
        WRITERS[writer](pipeline, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


@pytest.mark.parametrize("out", ["folder", "one.safetensors"])
def test_convert_ends_with_a_sentence_and_bfloat16_holds_what_it_names(
    pipeline: Pipeline, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    enlarge(pipeline, "unet")
    pipeline.save_pretrained(tmp_path / "model")
    arguments = ["convert", str(tmp_path / "model"), str(tmp_path / out), "--dtype"]
    assert main([*arguments, "float16"]) == 2
    said = capsys.readouterr().err
    assert "too large for torch.float16" in said
    assert "bfloat16 or float32 or float64 can hold it" in said
    assert not (tmp_path / out).exists()
    assert main([*arguments, "bfloat16"]) == 0
    assert Pipeline.from_pretrained(tmp_path / out).dtype == torch.float32
    with pytest.raises(ValueError, match=r"too large for torch\.float16.*bfloat16"):
        Pipeline.from_pretrained(tmp_path / out, dtype=torch.float16)


def test_float16_holds_all_up_to_its_largest_number(pipeline: Pipeline, tmp_path: Path) -> None:
    """65,519 is rounded to 65,504; 65,520 is half way to the first number that there is not."""
    enlarge(pipeline, "unet", 65_519.0)
    pipeline.save_pretrained(tmp_path / "out", dtype=torch.float16)
    name = next(iter(pipeline.unet.state_dict()))
    assert load_file(tmp_path / "out" / PARTS["unet"])[name].flatten()[0] == 65_504
    enlarge(pipeline, "unet", 65_520.0)
    with pytest.raises(ValueError, match="too large"):
        pipeline.save_pretrained(tmp_path / "again", dtype=torch.float16)


def test_a_pickle_is_converted_or_refused(tmp_path: Path) -> None:
    """LDM's table of sqrt(1 / alpha) is infinite where a schedule ends in pure noise."""
    table = torch.tensor([1.0, float("inf")])
    torch.save({"a": torch.tensor([LARGE]), "table": table}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"out\.safetensors cannot be written: tensor a is too"):
        convert_pickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors", dtype=torch.float16)
    assert not (tmp_path / "out.safetensors").exists()
    convert_pickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors", dtype=torch.bfloat16)
    assert load_file(tmp_path / "out.safetensors")["table"].isinf().tolist() == [False, True]


@pytest.mark.interchange
def test_a_lora_too_large_for_the_networks_precision_is_refused(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Its numbers take the precision of the layer that they lie on, and became infinite there."""
    lora = {name: tensor.float() for name, tensor in in_peft_names(
        random_lora(pipeline.unet, ATTENTION, rank=2)
    ).items()}  # fmt: skip
    next(iter(lora.values())).flatten()[0] = LARGE
    save_safetensors(lora, tmp_path / "x.safetensors")
    pipeline.to(torch.float16)
    with pytest.raises(ValueError, match=r"x\.safetensors: tensor .* too large for torch\.float16"):
        pipeline.loras.load(tmp_path / "x.safetensors")
    assert pipeline.loras.scales == {}


def test_an_average_too_large_for_the_models_precision_is_refused(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Snapshots end where float16 does, but a weighted sum of them need not."""
    name = next(iter(pipeline.unet.state_dict()))
    for step, sign in ((100, -1), (200, 1)):
        weights = {n: torch.zeros_like(t) for n, t in pipeline.unet.state_dict().items()}
        weights[name].flatten()[0] = sign * 65_000.0
        save_snapshot(tmp_path / "ema", step, {"0.05": weights})
    pipeline.save_pretrained(tmp_path / "model", dtype=torch.float16)
    synthesis = Synthesis(find_snapshots(tmp_path / "ema"), [-1.0, 2.0], error=0.0)
    with pytest.raises(ValueError, match=r"be written: tensor .* too large for torch\.float16"):
        write_model(tmp_path / "model", tmp_path / "out", (PARTS["unet"],), synthesis)
    assert not (tmp_path / "out").exists()


KINDS = {"unet": torch.float16, "vae": torch.float32, "text_encoder": torch.bfloat16}


def kinds(path: Path) -> dict[str, set[torch.dtype]]:
    return {part: set(read_header(path / file).dtypes.values()) for part, file in PARTS.items()}


def test_convert_leaves_each_network_in_its_own_precision(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """A VAE in float32 beside a UNet in float16 was rounded to float16, which nobody asked for."""
    for part, dtype in KINDS.items():
        getattr(pipeline, part).to(dtype)
    pipeline.save_pretrained(tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "one.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "again")]) == 0
    assert kinds(tmp_path / "again") == {part: {dtype} for part, dtype in KINDS.items()}
    for file in PARTS.values():
        before, after = load_file(tmp_path / "model" / file), load_file(tmp_path / "again" / file)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_model_in_float8_is_converted(
    pipeline: Pipeline, tmp_path: Path, dtype: torch.dtype
) -> None:
    """As ComfyUI saves them; it ended with "tuple.index(x): x not in tuple"."""
    pipeline.save_single_file(tmp_path / "one.safetensors", dtype=dtype)
    assert main(["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "folder")]) == 0
    assert kinds(tmp_path / "folder") == {part: {dtype} for part in PARTS}
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "two.safetensors")]) == 0
    one, two = (load_safetensors(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert all(torch.equal(two[name].float(), tensor.float()) for name, tensor in one.items())


def test_auto_is_bfloat16_where_the_device_computes_in_it(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        loaded = Pipeline.from_pretrained(tmp_path / "model", dtype="auto")
        assert {p.dtype for network in loaded.components[:3] for p in parameters(network)} == {
            dtype
        }
    assert Pipeline.from_pretrained(tmp_path / "model").dtype == torch.float32


def parameters(network: Any) -> list[torch.Tensor]:
    return list(getattr(network, "model", network).parameters())


def test_a_precision_that_is_no_dtype_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    wrong: Any = "bf16"
    with pytest.raises(ValueError, match=r"dtype='bf16' must be a dtype such as .*, 'auto'"):
        Pipeline.from_pretrained(tmp_path / "model", dtype=wrong)
