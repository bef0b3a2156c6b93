"""`latentdiff convert`: every form holds the same numbers; pickles are opened only if asked."""

import ast
import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.interchange_table import Measured
from support.parity import same_weights
from support.tiny import tiny_pipeline

from latentdiff.cli import main
from latentdiff.formats.header import read_header
from latentdiff.formats.ldm.keys import UNET
from latentdiff.formats.pickle import read_pickle
from latentdiff.formats.weights import load_safetensors, save_safetensors
from latentdiff.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
PARTS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(tmp_path_factory.mktemp("tokens")).save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def pickled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as it would have been published in 2022."""
    folder = tmp_path_factory.mktemp("pickled")
    for path in model.rglob("*"):
        target = folder / path.relative_to(model)
        if path.is_dir():
            target.mkdir()
        elif path.suffix != ".safetensors":
            target.write_bytes(path.read_bytes())
    for part, (stem, former) in PARTS.items():
        tensors = load_file(model / part / f"{stem}.safetensors")
        torch.save(OrderedDict(tensors), folder / part / f"{former}.bin")
    return folder


def convert(*arguments: str | Path) -> int:
    return main(["convert", *map(str, arguments)])


def assert_same_model(one: Path, other: Path) -> None:
    ours, theirs = Pipeline.from_pretrained(one), Pipeline.from_pretrained(other)
    for name in PARTS:
        assert same_weights(getattr(ours, name), getattr(theirs, name)), name
    assert ours.diffusion == theirs.diffusion
    assert ours.unet.config == theirs.unet.config


def test_folder_to_single_file_to_folder_is_bit_exact(
    model: Path, tmp_path: Path, measured: Measured
) -> None:
    assert convert(model, tmp_path / "one.safetensors") == 0
    assert convert(tmp_path / "one.safetensors", tmp_path / "folder") == 0
    assert_same_model(model, tmp_path / "one.safetensors")
    assert_same_model(model, tmp_path / "folder")
    measured("latentdiff convert", "folder to single file and back", "latentdiff", "files", 0)


def test_weights_keep_their_precision_unless_another_is_asked_for(
    model: Path, tmp_path: Path
) -> None:
    assert convert(model, tmp_path / "half", "--dtype", "float16") == 0
    assert convert(tmp_path / "half", tmp_path / "half.safetensors") == 0
    assert convert(tmp_path / "half.safetensors", tmp_path / "again") == 0
    for part, (stem, _) in PARTS.items():
        path = Path(part) / f"{stem}.safetensors"
        assert set(read_header(tmp_path / "again" / path).dtypes.values()) == {torch.float16}
        before, after = load_file(tmp_path / "half" / path), load_file(tmp_path / "again" / path)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_metadata_of_a_file_go_on_into_the_next(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Author, licence and recipe were gone after a change of precision."""
    said = {"modelspec.author": "Ada", "ss_tag": "x", "recipe": "a + b", "modelspec.title": "T"}
    assert convert(model, tmp_path / "one.safetensors") == 0
    header = read_header(tmp_path / "one.safetensors")
    tensors = load_safetensors(tmp_path / "one.safetensors")
    save_safetensors(tensors, tmp_path / "two.safetensors", header.metadata | said)
    capsys.readouterr()
    assert convert(tmp_path / "two.safetensors", tmp_path / "three.safetensors") == 0
    assert "no place" not in capsys.readouterr().out
    found = read_header(tmp_path / "three.safetensors").metadata
    assert {key: found.get(key) for key in said} == said
    assert found["modelspec.hash_sha256"] == header.metadata["modelspec.hash_sha256"]
    assert convert(tmp_path / "two.safetensors", tmp_path / "folder") == 0
    assert "no place for 3 entries of the file's metadata: modelspec.author, recipe, ss_tag\n" in (
        capsys.readouterr().out
    )
    assert convert(tmp_path / "one.safetensors", tmp_path / "quiet") == 0
    assert "no place" not in capsys.readouterr().out


def test_what_a_folder_holds_besides_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The licence of a model stayed behind without a word."""
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "LICENSE.md").write_text("ours")
    (tmp_path / "model" / "safety_checker").mkdir()
    assert convert(tmp_path / "model", tmp_path / "folder", "--dtype", "float16") == 0
    assert "holds: LICENSE.md, safety_checker\n" in capsys.readouterr().out
    assert convert(tmp_path / "folder", tmp_path / "one.safetensors") == 0
    assert "Left out" not in capsys.readouterr().out


def test_running_averages_are_taken_if_asked_and_else_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were left out without a word, and there was no way to have them."""
    assert convert(model, tmp_path / "one.safetensors") == 0
    metadata = read_header(tmp_path / "one.safetensors").metadata
    tensors = load_safetensors(tmp_path / "one.safetensors")
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(UNET).replace(".", ""): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith(UNET)
    }
    save_safetensors(tensors | averages, tmp_path / "full.safetensors", metadata)
    capsys.readouterr()
    assert convert(tmp_path / "full.safetensors", tmp_path / "plain") == 0
    assert "running averages as well, which are left out; --ema takes" in capsys.readouterr().out
    assert convert(tmp_path / "full.safetensors", tmp_path / "ema", "--ema") == 0
    assert "left out" not in capsys.readouterr().out
    file = "unet/diffusion_pytorch_model.safetensors"
    plain, averaged = (load_file(tmp_path / name / file) for name in ("plain", "ema"))
    assert all(torch.equal(averaged[name], tensor + 1) for name, tensor in plain.items())
    assert convert(tmp_path / "one.safetensors", tmp_path / "none", "--ema") == 2
    assert "it holds no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("model", ["--config", "x.yaml"], "--config x.yaml has no meaning for IN="),
        ("model", ["--tokenizer", "x"], "--tokenizer x has no meaning"),
        ("model", ["--ema"], "--ema has no meaning"),
        ("model", ["--revision", "v1"], "revision='v1' is of a model on the Hugging Face Hub"),
        ("emoji", ["--revision", "v1"], "revision='v1' is of a model on the Hugging Face Hub"),
        ("one.safetensors", ["--variant", "fp16"], "--variant fp16 has no meaning"),
        ("one.safetensors", ["--revision", "v1"], "--revision v1 has no meaning"),
        ("old.ckpt", ["--unsafe_pickle", "--config", "x.yaml"], "--config x.yaml has no meaning"),
        ("old.ckpt", ["--unsafe_pickle", "--ema"], "--ema has no meaning"),
    ],
)
def test_an_option_without_effect_is_refused(
    tmp_path: Path,
    source: str,
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "one.safetensors").touch()
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.ckpt")
    source = source if source == "emoji" else str(tmp_path / source)
    assert convert(source, tmp_path / "out.safetensors", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("option", ["revision", "variant"])
def test_a_single_file_has_no_revision_and_no_variant(tmp_path: Path, option: str) -> None:
    """Both were passed over, as if they had been found."""
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(ValueError, match=f"{option}='fp16' is not of a single file"):
        Pipeline.from_pretrained(tmp_path / "one.safetensors", **{option: "fp16"})
    command = ["generate", "a cat", "--model", str(tmp_path / "one.safetensors")]
    assert main([*command, f"--{option}", "fp16", "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("out", ["there", "there.safetensors", "m.ckpt", "m.bin", "m.PT"])
def test_nothing_is_overwritten_and_no_pickle_is_written(
    model: Path, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    assert convert(model, tmp_path / out) == 2
    assert f"OUT={tmp_path / out} " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.interchange
def test_a_folder_of_pickles_becomes_the_model_that_it_was(
    model: Path,
    pickled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    measured: Measured,
) -> None:
    assert convert(pickled, tmp_path / "refused") == 2
    assert "latentdiff convert --unsafe_pickle" in capsys.readouterr().err
    assert convert("--unsafe_pickle", pickled, tmp_path / "folder") == 0
    assert_same_model(model, tmp_path / "folder")
    assert convert("--unsafe_pickle", pickled, tmp_path / "one.safetensors") == 0
    assert_same_model(model, tmp_path / "one.safetensors")
    assert {path.name for path in tmp_path.iterdir()} >= {"folder", "one.safetensors"}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".convert")]
    measured(".bin folder", "read", "torch.save, by --unsafe_pickle", "weights", 0)


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_becomes_safetensors_with_its_names(
    tmp_path: Path, ending: str, zipped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(3), "tied": torch.zeros(0)}
    tensors["tied"] = tensors["a.weight"].T
    checkpoint = {"state_dict": tensors, "global_step": 7, "lr": 0.1, "optimizer_states": [{}]}
    path = tmp_path / f"model{ending}"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    assert convert(path, tmp_path / "refused.safetensors") == 2
    assert "latentdiff convert --unsafe_pickle" in capsys.readouterr().err
    assert convert(path, tmp_path / "new.safetensors", "--unsafe_pickle") == 0
    loaded = load_safetensors(tmp_path / "new.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_single_file_of_pickles_becomes_a_folder(
    model: Path, tmp_path: Path, measured: Measured
) -> None:
    assert convert(model, tmp_path / "one.safetensors") == 0
    tensors: dict[str, Any] = dict(load_safetensors(tmp_path / "one.safetensors"))
    torch.save({"state_dict": tensors}, tmp_path / "one.ckpt")
    assert convert(tmp_path / "one.ckpt", tmp_path / "same.safetensors", "--unsafe_pickle") == 0
    again = load_safetensors(tmp_path / "same.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    measured(".ckpt", "read", "torch.save, by --unsafe_pickle", "weights", 0)


class Canary:
    """Writes a file when it is unpickled by anything but torch's restricted unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("by", ["torch", "torch without zip", "pickle"])
@pytest.mark.parametrize("flag", ["--unsafe_pickle", None])
def test_a_pickle_that_runs_code_never_does(
    tmp_path: Path, by: str, wrapped: bool, flag: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path, canary = tmp_path / "model.ckpt", tmp_path / "canary"
    content = (
        {"state_dict": {"a": torch.zeros(1), "evil": Canary(canary)}} if wrapped else Canary(canary)
    )
    if by == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=by == "torch")
    assert convert(path, tmp_path / "out.safetensors", *([flag] if flag else [])) == 2
    reason = "holds more than tensors" if flag else "latentdiff convert --unsafe_pickle"
    assert reason in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.zeros(3)], "holds 'list', not tensors by name"),
        ({"state_dict": {}}, "holds 0 tensors"),
        ({"epoch": 3}, "holds 0 tensors"),
        (
            {"step": torch.ones(1), "model": {"a": torch.zeros(3)}},
            "and others inside 'model'; only",
        ),
        ({"a": torch.zeros(1).expand(10**12)}, "would take more than twice its"),
        ({"a": torch.eye(3).to_sparse()}, "is sparse or quantized"),
    ],
)
def test_what_is_not_weights_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=reason):
        read_pickle(tmp_path / "model.pt")


def test_numbers_that_are_not_finite_are_found_when_the_model_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([float("nan")])}, tmp_path / "model.pt")
    assert convert("--unsafe_pickle", tmp_path / "model.pt", tmp_path / "m.safetensors") == 0
    with pytest.raises(ValueError, match="tensor a holds NaN"):
        load_safetensors(tmp_path / "m.safetensors")


# What runs code or builds objects at a file's word, and the one module that may call one of them.
UNSAFE = {
    "torch": {"load", "jit", "package"},
    "pickle": {"load", "loads", "Unpickler"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
}
HARMLESS = {"torch.jit.trace", "torch.jit.is_tracing"}  # which read no file
ALLOWED = {Path("latentdiff/formats/pickle.py"): {"torch.load"}}


def unsafe_calls(tree: ast.Module) -> set[str]:
    found = set()
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    harmless = [node.value for node in attributes if ast.unparse(node) in HARMLESS]
    for node in ast.walk(tree):
        if node in harmless:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in UNSAFE.get(node.value.id, ()):
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = (node.module or "").split(".")[0]
            wanted = UNSAFE.get(module, set()) | ({"_load"} if module == "torch" else set())
            found |= {f"{module}.{alias.name}" for alias in node.names if alias.name in wanted}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & {"eval", "exec", "__import__"}
    return found


def test_files_are_unpickled_in_one_place_and_code_of_files_runs_in_none() -> None:
    paths = [path for top in ("latentdiff", "train") for path in (ROOT / top).rglob("*.py")]
    assert len(paths) > 40
    for path in paths:
        found = unsafe_calls(ast.parse(path.read_text(encoding="utf-8")))
        assert found == ALLOWED.get(path.relative_to(ROOT), set()), path


def test_the_one_place_unpickles_tensors_alone() -> None:
    tree = ast.parse((ROOT / "latentdiff/formats/pickle.py").read_text(encoding="utf-8"))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert given == {"map_location": "'cpu'", "weights_only": "True"}


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "from torch.serialization import load as l",
        "pickle.loads(b'')",
        "yaml.load(text)",
        "torch.jit.load(path)",
        "eval(text)",
    ],
)
def test_the_search_for_unsafe_calls_finds_them(code: str) -> None:
    assert unsafe_calls(ast.parse(code))


def test_a_converted_folder_that_does_not_fit_together_is_not_written(
    pickled: Path, tmp_path: Path
) -> None:
    """It is read before it is written, and what was made on the way goes."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in pickled.rglob("*"):
        target = copy / path.relative_to(pickled)
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    config = json.loads((copy / "unet/config.json").read_text())
    (copy / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 24}))
    assert convert("--unsafe_pickle", copy, tmp_path / "out") == 2
    assert list(tmp_path.iterdir()) == [copy]
