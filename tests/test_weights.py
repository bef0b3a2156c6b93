"""Weights and JSON on disk: round trips, refusals in one sentence, never a half-written file."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from latentdiff.formats.weights import load_json, load_safetensors, save_json, save_safetensors

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([3.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "model.safetensors"


def test_tensors_come_back_bit_for_bit(path: Path) -> None:
    save_safetensors(TENSORS, path)
    loaded = load_safetensors(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_transposed_parameter_that_needs_a_gradient_can_be_saved(path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    save_safetensors({"t": parameter.T}, path)
    assert torch.equal(load_safetensors(path)["t"], parameter.detach().T)


def test_the_header_says_pytorch_as_transformers_demands_and_keeps_metadata(path: Path) -> None:
    save_safetensors(TENSORS, path, metadata={"step": "3"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}


def test_what_was_loaded_can_be_saved_over_its_own_file(path: Path) -> None:
    """The loaded tensors are a map of the file: writing into it in place would change them."""
    save_safetensors(TENSORS, path)
    loaded = load_safetensors(path)
    save_safetensors(loaded, path)
    assert torch.equal(load_safetensors(path)["a.weight"], TENSORS["a.weight"])


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save_safetensors(TENSORS, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            save_safetensors({"other": torch.zeros(3)}, path)
    assert load_safetensors(path).keys() == TENSORS.keys()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_a_file_has_the_permissions_that_the_umask_gives(path: Path) -> None:
    """safetensors writes through a private temporary file: a shared model was unreadable."""
    old = os.umask(0o022)
    try:
        save_safetensors(TENSORS, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["model.ckpt", "model.SafeTensors", "model.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_whatever_it_is_called(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"{name}: is a pickled checkpoint"):
        load_safetensors(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 64, b"<html>not found</html>"])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: is not a whole safetensors file"):
        load_safetensors(path)


def test_a_truncated_file_is_refused(path: Path) -> None:
    save_safetensors(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_safetensors(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        load_safetensors(path)
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_json(path.with_name("config.json"))


def test_json_comes_back_with_sorted_keys_and_readable_chinese(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_json({"z": [1, None, 0.1], "a": "猫"}, path)
    assert load_json(path) == {"z": [1, None, 0.1], "a": "猫"}
    text = path.read_text(encoding="utf-8")
    assert "猫" in text
    assert text.index('"a"') < text.index('"z"')


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "not valid JSON"), (b'{"a": "\xff"}', "not valid JSON"), (b"[1]", "a JSON list")],
)
def test_broken_json_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{reason}"):
        load_json(path)
