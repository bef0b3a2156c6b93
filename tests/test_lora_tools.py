"""LoRA files that are written: names, ranks, the difference of two models, merged ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from support.loras import TEXT, UNET, in_kohya_names, kohya_file, random_lora
from support.tiny import tiny_pipeline
from torch import Tensor, nn

from latentdiff.cli import main
from latentdiff.formats.lora import LoRAFile, is_lora, read_lora
from latentdiff.formats.lora_layers import LoRALayer
from latentdiff.formats.lora_writing import Names, write_lora
from latentdiff.models.low_rank import difference, low_rank, resized
from latentdiff.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    pipeline.save_pretrained(folder)
    return folder


def random_file(pipeline: Pipeline, rank: int = 4, alpha: float = 3.0) -> LoRAFile:
    """Every kind of layer, of the UNet and of the text encoder."""
    parts = []
    for network, names in ((pipeline.unet, UNET), (pipeline.text_encoder.model, TEXT)):
        tensors = {n: t.float() for n, t in random_lora(network, names, rank=rank).items()}
        layers = sorted({name.partition(".lora_")[0] for name in tensors})
        parts.append({
            name.removeprefix("text_model."): LoRALayer(
                tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], alpha
            )
            for name in layers
        })  # fmt: skip
    return LoRAFile(*parts)


def change(layer: LoRALayer) -> Tensor:
    """alpha / r · up · down, (out, in·h·w) float64."""
    product = layer.up.flatten(1).double() @ layer.down.flatten(1).double()
    return layer.alpha / layer.rank * product


@pytest.mark.parametrize("names", get_args(Names))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_written_lora_is_read_back(
    pipeline: Pipeline, tmp_path: Path, names: Names, dtype: torch.dtype
) -> None:
    file, path = random_file(pipeline), tmp_path / "lora.safetensors"
    write_lora(file, path, names=names, dtype=dtype, metadata={"modelspec.title": "x"})
    again = read_lora(path, layers_per_block=1)
    for part in ("unet", "text_encoder"):
        expected, found = getattr(file, part), getattr(again, part)
        assert found.keys() == expected.keys()
        for name, layer in expected.items():
            error = (change(found[name]) - change(layer)).norm() / change(layer).norm()
            assert error < 2 * torch.finfo(dtype).eps
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.title"] == "x"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "3.0")


@pytest.mark.interchange
@pytest.mark.parametrize("names", get_args(Names))
def test_diffusers_computes_the_same_with_a_file_of_ours(
    folder: Path, tmp_path: Path, names: Names
) -> None:
    """Every kind of layer that diffusers adapts: attention, feed-forward, convolutions, text."""
    ours = Pipeline.from_pretrained(folder, dtype=torch.float64)
    path = tmp_path / "lora.safetensors"
    write_lora(random_file(ours), path, names=names, dtype=torch.float32)
    ours.loras.load(path)
    theirs = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float64)
    theirs.load_lora_weights(str(path))
    rng = torch.Generator().manual_seed(0)
    c = ours.unet.config
    x = torch.randn(2, c.in_channels, 8, 8, generator=rng, dtype=torch.float64)
    t = torch.tensor([10.0, 500.0], dtype=torch.float64)
    states = torch.randn(2, 7, c.cross_attention_dim, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.unet(x, t, states).sample
        assert (ours.unet(x, t, states) - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("shape", [(12, 7), (6, 30), (8, 4, 3, 3)])
def test_the_nearest_lora_leaves_the_smallest_singular_values(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=rng)
    values = torch.linalg.svdvals(weight.flatten(1).double())
    for rank in (1, 3, len(values), 100):
        layer = low_rank(weight, rank)
        assert layer.rank == min(rank, len(values))
        assert layer.down.shape[1:] == weight.shape[1:]
        left = weight.flatten(1) - change(layer)
        assert float(left.norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-5)


@pytest.mark.parametrize("shape", [(12, 7), (8, 4, 3, 3)])
def test_a_smaller_rank_is_the_nearest_to_the_larger(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    down = torch.randn(5, *shape[1:], generator=rng)
    up = torch.randn(shape[0], 5, *(1 for _ in shape[2:]), generator=rng)
    layer = LoRALayer(down, up, alpha=2.0)
    smaller, direct = resized(layer, 2), low_rank(change(layer).reshape(shape), 2)
    assert smaller.rank == 2
    assert (change(smaller) - change(direct)).abs().max() < 1e-5
    assert (change(resized(layer, 9)) - change(layer)).abs().max() < 1e-5


def test_the_difference_to_a_merged_model_is_the_lora(pipeline: Pipeline, tmp_path: Path) -> None:
    lora, path = random_file(pipeline), tmp_path / "lora.safetensors"
    write_lora(lora, path, dtype=torch.float32)
    base, tuned = (tiny_pipeline(tmp_path / name) for name in ("base", "tuned"))
    tuned.loras.load(path)
    tuned.loras.fuse()
    found = difference(base.unet, tuned.unet, rank=4)
    assert found.layers.keys() == lora.unet.keys()
    assert found.others == []
    assert found.left < 1e-5
    for name, layer in found.layers.items():
        assert (change(layer) - change(lora.unet[name])).abs().max() < 1e-5
    assert difference(base.unet, tuned.unet, rank=1).left > 0.1


def test_what_no_lora_can_hold_is_named(pipeline: Pipeline, tmp_path: Path) -> None:
    base, tuned = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4))
    found = difference(base, tuned, rank=2)
    assert (list(found.layers), found.others) == (["0"], ["0.bias"])
    with pytest.raises(ValueError, match=r"0\.bias is \(5,\), and \(4,\) in the base model"):
        difference(base, nn.Sequential(nn.Linear(3, 5)), rank=2)


def drawn(pipeline: Pipeline) -> Any:
    return pipeline("a red circle", seed=0, steps=3, progress=False).images[0].tobytes()


def convert(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def test_convert_merges_extracts_resizes_and_renames(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    lora = kohya_file(tmp_path / "lora.safetensors", pipeline, alpha=3.0)
    assert is_lora(lora)
    convert(folder, tmp_path / "merged", "--lora", f"{lora}:0.5")
    pipeline.loras.load(lora, scale=0.5)
    pipeline.loras.fuse()
    assert drawn(Pipeline.from_pretrained(tmp_path / "merged")) == drawn(pipeline)

    again = tmp_path / "again.safetensors"
    convert(tmp_path / "merged", again, "--lora_of", folder, "--lora_rank", 4, "--dtype", "float32")
    assert "0.0% of their change is left" in capsys.readouterr().out
    first, second = (read_lora(path, layers_per_block=1) for path in (lora, again))
    for part in ("unet", "text_encoder"):
        for name, layer in getattr(first, part).items():
            half = replace(layer, alpha=layer.alpha / 2)
            assert (change(getattr(second, part)[name]) - change(half)).abs().max() < 1e-5

    renamed = tmp_path / "renamed.safetensors"
    convert(lora, renamed, "--lora_names", "diffusers", "--lora_rank", 2)
    third = read_lora(renamed, layers_per_block=1)
    assert third.unet.keys() == first.unet.keys()
    assert {layer.rank for layer in third.unet.values()} == {2}
    assert safe_open(renamed, "pt").keys()[0].endswith(".lora_A.weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "x.safetensors", "--lora_rank", "4"], "--lora_rank is of the LoRA that is wri"),
        (["MODEL", "x", "--lora_of", "MODEL"], "is to be a LoRA, a file that ends in"),
        (["MODEL", "x.safetensors", "--lora_of", "MODEL"], "nothing is changed"),
        (["LORA", "x"], "is to be a LoRA, a file that ends in"),
        (["LORA", "x.safetensors", "--lora", "LORA"], "--lora is for a model"),
        (["LORA", "x.safetensors", "--lora_rank", "0"], "--lora_rank 0 must be at least 1"),
        (["LORA", "x.safetensors", "--tokenizer", "x"], "--tokenizer is for a model"),
        (["MODEL", "x", "--lora", "nowhere"], "--lora nowhere: nowhere is not a file"),
    ],
)
def test_what_convert_cannot_do_with_loras_is_one_sentence(
    folder: Path,
    pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    lora = tmp_path / "lora.safetensors"
    kohya_file(lora, pipeline, alpha=1.0)
    known = {"MODEL": str(folder), "LORA": str(lora)}
    assert main(["convert", *(known.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.safetensors").exists()


def test_a_model_is_no_lora(folder: Path, tmp_path: Path) -> None:
    assert not is_lora(folder / "unet/diffusion_pytorch_model.safetensors")
    assert not is_lora(folder / "unet/config.json")
    layer = {"conv_in.lora_A.weight": torch.ones(1, 1), "conv_in.lora_B.weight": torch.ones(1, 1)}
    from safetensors.torch import save_file

    save_file(in_kohya_names(layer, "lora_unet_", {}), tmp_path / "x.safetensors")
    assert is_lora(tmp_path / "x.safetensors")
