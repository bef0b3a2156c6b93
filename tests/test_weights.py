"""Weights and JSON on disk: round trips, refusals in one sentence, never a half-written file."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from latentdiff.formats import header
from latentdiff.formats.header import read_header
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
    """They once were a map of the file, so that writing into it in place would change them."""
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


@pytest.mark.parametrize("name", ["model.ckpt", "model.SafeTensors"])
def test_the_refusal_of_a_pickle_names_the_command_that_converts_it(
    tmp_path: Path, name: str
) -> None:
    torch.save(TENSORS, tmp_path / name)
    with pytest.raises(ValueError, match=r"`latentdiff convert --unsafe_pickle`"):
        load_safetensors(tmp_path / name)


def write(path: Path, entries: object, data: bytes = b"") -> None:
    """A safetensors file with any header; `entries` may be the JSON text of one."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_is_read_without_the_numbers(path: Path) -> None:
    save_safetensors(TENSORS, path, metadata={"step": "3"})
    found = read_header(path)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert found.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}
    assert found.metadata == {"format": "pt", "step": "3"}


@pytest.mark.parametrize(
    ("entries", "data", "reason"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), "b does not begin"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), "b does not begin"),
        ({"a": entry(0, 4, [1])}, bytes(8), "end at byte"),
        ({"a": entry(0, 8, [2])}, bytes(4), "end at byte"),
        ({"a": entry(0, 4, [2])}, bytes(4), r"a of shape \[2\] does not fill"),
        ({"a": entry(0, 4, [-1])}, bytes(4), "whole numbers"),
        ({"a": entry(0, 4, [True])}, bytes(4), "whole numbers"),
        ({"a": entry(0, 0, [0, 2**40, 2**40])}, b"", "has the shape"),
        ({"a": entry(0, 4, [1] * 9)}, bytes(4), "has the shape"),
        ({"a": entry(0, 4, [1], "C64")}, bytes(4), "dtype 'C64'; allowed: F64, F32"),
        ({"a": entry(0, 4, [1], ["F32"])}, bytes(4), "allowed: F64, F32"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "is described by"),
        ({"a": [0]}, bytes(4), "is described by"),
        ({"__metadata__": {"step": 3}}, b"", "metadata is not an object of texts"),
        ([], b"", "not a JSON object"),
        ("[" * 100_000, b"", "nested too deep"),
        ('{"a": 1, "a": 1}', b"", "key 'a' is there twice"),
    ],
)
def test_a_header_that_does_not_add_up_is_refused(
    path: Path, entries: object, data: bytes, reason: str
) -> None:
    write(path, entries, data)
    with pytest.raises(ValueError, match=rf"is not a whole safetensors file \(.*{reason}"):
        load_safetensors(path)


def test_a_tensor_that_is_there_twice_is_refused(path: Path) -> None:
    """safetensors takes the last of the two, so that a checker may have seen other numbers."""
    one = json.dumps(entry(0, 4, [1]))
    write(path, f'{{"a": {one}, "a": {one}}}', bytes(4))
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["a"]
    with pytest.raises(ValueError, match="the key 'a' is there twice"):
        load_safetensors(path)


@pytest.mark.parametrize(("limit", "value"), [("MAX_TENSORS", 3), ("MAX_HEADER_BYTES", 200)])
def test_a_header_beyond_every_model_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    save_safetensors(TENSORS, path)
    read_header(path)
    monkeypatch.setattr(header, limit, value)
    with pytest.raises(ValueError, match=f"over the limit of {value}"):
        read_header(path)


def test_weights_that_do_not_fit_are_refused_before_memory_is_taken_for_them(path: Path) -> None:
    """The file is a terabyte, all of it hole: reading it would end the test."""
    write(path, {"a": entry(0, 2**40, [2**20, 2**18])})
    os.truncate(path, path.stat().st_size + 2**40)
    with pytest.raises(ValueError, match=r"first a: \(1048576, 262144\) in the file, \(2, 2\) by"):
        load_safetensors(path, expected={"a": torch.empty(2, 2, device="meta")})
    with pytest.raises(ValueError, match="first b: missing in the file"):
        load_safetensors(
            path,
            expected={"b": torch.empty(2)},
            optional=lambda name: name == "a",
        )


def test_only_what_is_expected_is_read_and_the_rest_must_be_optional(path: Path) -> None:
    save_safetensors(TENSORS, path)
    expected = {"half": torch.empty(2, device="meta")}
    loaded = load_safetensors(path, expected=expected, optional=lambda name: name != "half")
    assert loaded.keys() == {"half"}
    with pytest.raises(ValueError, match=r"in 2 tensors, first brain: \(1,\) in the file, none by"):
        load_safetensors(path, expected=expected, optional=lambda name: name[0] == "a")


def test_names_can_be_read_under_others_but_not_two_under_one(path: Path) -> None:
    save_safetensors(TENSORS, path)
    loaded = load_safetensors(path, rename=lambda name: f"model.{name}")
    assert loaded.keys() == {f"model.{name}" for name in TENSORS}
    with pytest.raises(ValueError, match="tensor same is there twice"):
        load_safetensors(path, rename=lambda name: "same")


def test_whole_numbers_are_not_taken_for_weights(path: Path) -> None:
    save_safetensors({"a": torch.zeros(2, dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match=r"tensor a holds torch\.int32 numbers"):
        load_safetensors(path, expected={"a": torch.empty(2)})


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_wherever_they_are(
    path: Path, dtype: torch.dtype, value: float
) -> None:
    for i in (0, 40, 82):
        numbers = torch.arange(83.0)
        numbers[i] = value
        save_safetensors({"ok": torch.ones(3), "a.weight": numbers.to(dtype)}, path)
        with pytest.raises(ValueError, match=r"tensor a\.weight holds NaN or infinite numbers"):
            load_safetensors(path)


def test_the_largest_numbers_of_each_precision_are_finite(path: Path) -> None:
    tensors = {
        str(d): torch.tensor([torch.finfo(d).max, -torch.finfo(d).max], dtype=d) for d in FLOATS
    }
    save_safetensors(tensors | {"none": torch.empty(0, 3)}, path)
    loaded = load_safetensors(path)
    assert all(torch.equal(loaded[name].double(), t.double()) for name, t in tensors.items())
    assert loaded["none"].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_numbers_are_converted_and_whole_ones_are_not(
    path: Path, dtype: torch.dtype
) -> None:
    save_safetensors(TENSORS, path)
    for name, tensor in load_safetensors(path, dtype=dtype).items():
        expected = TENSORS[name].to(dtype) if TENSORS[name].is_floating_point() else TENSORS[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_numbers_too_large_for_the_precision_asked_for_are_refused(path: Path) -> None:
    save_safetensors({"a": torch.tensor([1e6])}, path)
    with pytest.raises(ValueError, match=r"tensor a is too large for torch\.float16"):
        load_safetensors(path, dtype=torch.float16)


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 64])
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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", r"Git LFS.*`git lfs pull`"),
        ("\n<!DOCTYPE html><title>Log in</title>" + 90 * " ", "web page.*download it again"),
        ("<html>", "web page.*download it again"),
    ],
)
def test_what_stands_in_place_of_a_file_is_named(tmp_path: Path, content: str, reason: str) -> None:
    """Weights of a clone without Git LFS were "not a whole file", 70 bytes and all."""
    for name, load in (("model.safetensors", load_safetensors), ("config.json", load_json)):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}: is a .*{reason}"):
            load(tmp_path / name)


def test_a_json_file_given_as_weights_names_its_folder(tmp_path: Path) -> None:
    save_json({"_class_name": "StableDiffusionPipeline"}, tmp_path / "model_index.json")
    with pytest.raises(ValueError, match=f"give the model's folder, {tmp_path}"):
        load_safetensors(tmp_path / "model_index.json")


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
    [
        (b"{", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[1]", "a JSON list"),
        (b'{"a": 1, "a": 2}', "not valid JSON .the key 'a' is there twice"),
        (b'{"a":' * 100_000, "not valid JSON .it is nested too deep"),
        (b'{"a": "\\ud83e"}', "not valid JSON .it has half of a character"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * 16_000_001, "over the limit of 16000000 bytes"),
    ],
)
def test_broken_json_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{reason}"):
        load_json(path)
