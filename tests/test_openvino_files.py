"""The networks that engine="openvino" keeps on disk, the command line, and what is refused."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.command import generate, run
from support.settings import WITH_BF16
from support.tiny import tiny_pipeline

from latentdiff.engines import converted, openvino_network
from latentdiff.formats.png import read_png
from latentdiff.pipeline import Pipeline

pytestmark = pytest.mark.skipif(
    find_spec("openvino") is None, reason='needs pip install "latentdiff[openvino]"'
)
converts = pytest.mark.interchange

CALL: dict[str, Any] = {"steps": 2, "seed": 0, "progress": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its converted networks."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_pipeline(folder / "tokens").save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        load(folder)("a cat", **CALL)
    assert not (folder / "cache").exists()
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the networks that are converted, as they are."""
    names = []
    convert = openvino_network.Function.convert

    def counted(self: Any, *arguments: Any) -> Any:
        names.append(self.name)
        return convert(self, *arguments)

    monkeypatch.setattr(openvino_network.Function, "convert", counted)
    return names


def load(model: str | Path, **options: Any) -> Pipeline:
    return Pipeline.from_pretrained(model, engine="openvino", **{"dtype": torch.float32, **options})


def image(model: str | Path) -> bytes:
    return load(model)("a cat", **CALL).images[0].tobytes()


def times(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


# --- on disk


@converts
def test_a_second_start_reads_what_the_first_one_wrote(model: Path, conversions: list[str]) -> None:
    before = times(model / "openvino")
    names = {name.split("-")[0] for name in before}
    assert names == {"unet", "text_encoder", "vae_decoder", "compiled"}
    assert image(model) == image(model)
    assert conversions == []
    assert times(model / "openvino") == before


@converts
def test_other_weights_are_other_networks(
    model: Path, tmp_path: Path, conversions: list[str]
) -> None:
    """A training that goes on writes its model into the same folder."""
    first = image(model)
    pipe = Pipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(-1)
    pipe.save_pretrained(model)
    assert image(model) != first
    assert conversions == ["unet"]


@converts
def test_other_code_of_the_networks_converts_anew(
    model: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_network, "_code", lambda: "another")
    image(model)
    assert sorted(conversions) == ["text_encoder", "unet", "vae_decoder"]


@converts
@pytest.mark.parametrize("file", ["model.bin", "model.xml", "sizes.json"])
def test_a_half_written_network_is_not_believed(
    model: Path, conversions: list[str], file: str
) -> None:
    first = image(model)
    for compiled in (model / "openvino").glob("compiled-*"):
        shutil.rmtree(compiled)
    (path,) = (model / "openvino").glob(f"unet-*/{file}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert image(model) == first
    assert conversions == ["unet"]
    conversions.clear()
    assert image(model) == first
    assert conversions == []


@converts
def test_a_half_written_compiled_network_is_not_believed(model: Path) -> None:
    first = image(model)
    for path in (model / "openvino").glob("compiled-*/model.blob"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert image(model) == first


@converts
def test_networks_that_are_deleted_meanwhile_are_converted_anew(
    model: Path, conversions: list[str]
) -> None:
    pipe = load(model)
    pipe("a cat", **CALL)
    shutil.rmtree(model / "openvino")
    pipe("a cat", height=24, **CALL)
    assert sorted(conversions) == ["unet", "vae_decoder"]


@WITH_BF16
@converts
def test_a_compiled_network_is_for_one_precision(model: Path) -> None:
    """OpenVINO's own cache read for bfloat16 what it had compiled for float32, and gave NaN."""
    first = image(model)
    low = load(model, dtype=torch.bfloat16)("a cat", **CALL).images[0].tobytes()
    assert low != first
    assert load(model, dtype=torch.bfloat16)("a cat", **CALL).images[0].tobytes() == low
    assert image(model) == first


def test_of_two_processes_one_has_its_files_kept(tmp_path: Path) -> None:
    def write(entry: Path, content: str) -> None:
        (entry / "file").write_text(content)

    def slowly(entry: Path) -> None:
        write(entry, "first")
        converted.store([tmp_path], "entry", lambda other: write(other, "second"))

    kept = converted.store([tmp_path], "entry", slowly)
    assert kept == tmp_path / "entry" == converted.find([tmp_path], "entry")
    assert (kept / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_process_that_is_killed_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    left, fresh = tmp_path / ".killed", tmp_path / ".at-work"
    for folder in (left, fresh):
        (folder / "entry").mkdir(parents=True)
        (folder / "entry" / "file").write_text("half")
    day_before = time.time() - 2 * 24 * 60 * 60
    os.utime(left, (day_before, day_before))
    assert converted.find([tmp_path], "entry") is None

    def interrupted(entry: Path) -> None:
        (entry / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted.store([tmp_path], "entry", interrupted)
    assert [path.name for path in tmp_path.iterdir()] == [".at-work"]


def test_the_oldest_compiled_networks_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converted, "MOST_BYTES", 300)
    for i in range(3):
        entry = tmp_path / f"compiled-{i}"
        entry.mkdir()
        (entry / "file").write_bytes(bytes(100))
        os.utime(entry, (i, i))
    (tmp_path / "unet").mkdir()
    assert not converted.make_room(tmp_path, 301)
    assert len([*tmp_path.iterdir()]) == 4
    assert converted.make_room(tmp_path, 150)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiled-2", "unet"]


def test_what_is_not_the_users_own_folder_is_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    users = tmp_path / "latentdiff" / "openvino"
    embedded = Path(openvino_network.__file__).parents[1] / "pretrained" / "emoji"
    for name in ("emoji", "owner/name", embedded):
        assert converted.folders(name) == [users]
    own = tmp_path / "model.safetensors"
    own.touch()
    assert converted.folders(own) == [tmp_path / "model.openvino", users]
    assert converted.folders(tmp_path) == [tmp_path / "openvino", users]
    monkeypatch.setattr(converted, "HF_HUB_CACHE", str(tmp_path))
    assert converted.folders(tmp_path) == [users]


@converts
def test_a_folder_that_cannot_be_written_leaves_the_users_cache(
    model: Path, tmp_path: Path
) -> None:
    shutil.rmtree(model / "openvino")
    (model / "openvino").touch()  # a file, where root too cannot make a folder
    image(model)
    assert len([*(tmp_path / "cache" / "latentdiff" / "openvino").glob("unet-*")]) == 1


@converts
def test_where_nothing_can_be_written_it_draws_and_says_so(model: Path, tmp_path: Path) -> None:
    first = image(model)
    shutil.rmtree(model / "openvino")
    for path in (model / "openvino", tmp_path / "cache"):
        path.touch()
    with pytest.warns(UserWarning, match=r"cache.* cannot be written, so that .* at each start"):
        assert image(model) == first


# --- the command line


@converts
def test_an_image_says_its_engine_and_is_drawn_again_with_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(str(model), tmp_path / "1", "a cat", "--engine", "openvino") == 0
    (first,) = (tmp_path / "1").iterdir()
    record = read_png(first).record
    assert record is not None
    assert record.get("engine") == "openvino"
    assert record["packages"]["openvino"]
    assert run("generate", "--from", str(first), "--out", str(tmp_path / "2")) == 0
    (again,) = (tmp_path / "2").iterdir()
    assert Image.open(again).tobytes() == Image.open(first).tobytes()
    assert read_png(again).record == record
    assert "latentdiff:" not in capsys.readouterr().err
    torch_again = ["--from", str(first), "--engine", "torch", "--out", str(tmp_path / "3")]
    assert run("generate", *torch_again, "--dtype", "float32") == 0
    assert "drawn with" in (said := capsys.readouterr().err)
    assert "engine openvino (here torch)" in said


@converts
def test_an_image_of_before_there_were_engines_is_torchs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(str(model), tmp_path / "1", "a cat") == 0
    (first,) = (tmp_path / "1").iterdir()
    record = read_png(first).record
    assert record is not None
    assert record.pop("engine") == "torch"
    assert run("generate", "--from", str(first), "--out", str(tmp_path / "2")) == 0
    assert "latentdiff:" not in capsys.readouterr().err


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, "engine='tensorrt' must be one of torch, openvino"),
        ({"engine": "openvino", "device": "cuda"}, "device='cuda': OpenVINO computes on the CPU"),
        ({"engine": "openvino", "dtype": torch.float16}, "dtype=float16: OpenVINO computes in"),
        ({"engine": "openvino", "dtype": None}, "dtype=None: OpenVINO computes in float32"),
        (
            {"engine": "openvino", "dtype": "bf16"},
            "dtype='bf16' must be a dtype such as torch.float16, 'auto'",
        ),
        ({"dtype": "bf16"}, "dtype='bf16' must be a dtype such as torch.float16, 'auto'"),
    ],
)
def test_what_no_engine_does_is_refused_before_anything_is_read(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(tmp_path / "no model", **options)
    with pytest.raises(ValueError, match=message):
        Pipeline.from_single_file(tmp_path / "no model.safetensors", **options)


def test_a_processor_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> Any:
            return ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else None

    monkeypatch.setattr("latentdiff.engines.openvino.core", Core)
    pipe = Pipeline.from_pretrained("emoji", engine="openvino", dtype="auto")
    assert pipe.precision == torch.float32
    with pytest.raises(ValueError, match="dtype=bfloat16: OpenVINO computes in float32, and in"):
        Pipeline.from_pretrained("emoji", engine="openvino", dtype=torch.bfloat16)


@converts
def test_a_loaded_pipeline_is_not_moved(model: Path) -> None:
    pipe = load(model)
    assert pipe.to("cpu").engine == "openvino"
    with pytest.raises(ValueError, match=r"to\(bfloat16\): this pipeline computes in float32"):
        pipe.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"to\('cuda'\): OpenVINO computes on the CPU here"):
        pipe.to("cuda")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    openvino_network.core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    yield
    openvino_network.core.cache_clear()


@pytest.mark.usefixtures("absent")
def test_without_openvino_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModuleNotFoundError, match=r'pip install "latentdiff\[openvino\]"'):
        Pipeline.from_pretrained("emoji", engine="openvino")
    assert generate("emoji", tmp_path, "a cat", "--engine", "openvino") == 2
    said = capsys.readouterr().err
    assert said == (
        "latentdiff generate needs the package openvino: pip install 'latentdiff[openvino]'\n"
    )


def test_the_command_refuses_what_the_engine_does_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("emoji", tmp_path, "a cat", "--engine", "tensorrt") == 2
    assert "'tensorrt' must be one of" in capsys.readouterr().err
    assert generate("emoji", tmp_path, "a", "--engine", "openvino", "--dtype", "float16") == 2
    assert "dtype=float16: OpenVINO computes in float32" in capsys.readouterr().err
    assert generate("emoji", tmp_path, "a", "--engine", "openvino", "--device", "meta") == 2
    assert "device='meta'" in capsys.readouterr().err


@pytest.mark.processes
def test_openvino_reports_nothing_to_its_makers() -> None:
    """Its import and its converter send events, unless their package cannot be imported."""
    code = (
        "from latentdiff.engines.openvino_network import core; core(); "
        "from openvino.tools.ovc import telemetry_utils; print(telemetry_utils.tm.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "openvino.tools.ovc.telemetry_stub\n"
