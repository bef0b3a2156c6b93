"""Files that are broken or hostile are loaded right or refused: no crash, no hang, nothing written.

Ten thousand cases in `make test`, five hundred in `make check`; each has its own seed, so that a
failure names the case and `mutations.py` makes it again.
"""

import json
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.loras import in_peft_names, random_lora
from support.mutations import (
    any_json,
    at_most_more_memory,
    broken_metadata,
    broken_safetensors,
    broken_yaml,
    canaries,
    watched,
)
from support.tiny import CONTEXT_DIM, tiny_text_encoder
from torch import Tensor, nn

from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import check_pipeline_folder, load_scheduler_config
from latentdiff.formats.ldm.yaml_config import load_ldm_config, save_ldm_config, to_ldm_config
from latentdiff.formats.lora import read_lora
from latentdiff.formats.sharded_weights import load_weights
from latentdiff.formats.weights import load_json, load_safetensors, save_safetensors
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.pipeline import Pipeline

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the watch needs Linux"),
]

SECONDS = 10.0  # of one case; most take a thousandth of it
MEMORY = 300_000_000  # above what the process has; half of that was enough when measured

STEM = "diffusion_pytorch_model"
LORA = "adapter_model.safetensors"
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """A file of the model, how it is broken, and who reads it; `right` checks what is loaded."""

    file: str
    broken: Callable[[bytes, Random], bytes]
    read: Read
    right: Callable[[Path, object], bool]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as small as one can be, in every form; the UNet in shards as well."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    unet = UNet(
        UNetConfig(
            sample_size=4,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=CONTEXT_DIM,
            attention_head_dim=2,
            norm_num_groups=2,
        )
    )
    vae = VAE(VAEConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2))
    text_encoder = tiny_text_encoder(folder.parent / "tokens")
    diffusion = Diffusion("scaled_linear", "epsilon")
    pipeline = Pipeline(unet=unet, vae=vae, text_encoder=text_encoder, diffusion=diffusion)
    pipeline.save_pretrained(folder)
    pipeline.save_single_file(folder.parent / "single.safetensors")
    (folder.parent / "single.safetensors").rename(folder / "single.safetensors")

    (folder / "lora").mkdir()
    save_file(in_peft_names(random_lora(unet, ["conv1"], rank=2)), folder / "lora" / LORA)
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(LoraConfig(r=2).to_dict()))
    ldm_config = to_ldm_config(
        UNetConfig().to_dict(),
        VAEConfig().to_dict(),
        {"max_position_embeddings": 77},
        Diffusion("scaled_linear", "v_prediction").to_scheduler_config(),
        open_clip=False,
    )
    save_ldm_config(ldm_config, folder / "single.yaml")

    (folder / "shards").mkdir()
    (folder / "shards" / "config.json").write_bytes((folder / "unet/config.json").read_bytes())
    tensors = unet.state_dict()
    names = sorted(tensors)
    placed = {}
    for i in range(3):
        shard = f"{STEM}-0000{i + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / "shards" / shard)
        placed |= dict.fromkeys(names[i::3], shard)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "shards" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    save_safetensors(
        {
            "a.weight": torch.randn(3, 4),
            "b": torch.randn(5).half(),
            "c": torch.arange(4),
            "d": torch.randn(2, 2, 2, dtype=torch.bfloat16),
            "e": torch.zeros(0, 3),
        },
        folder / "few.safetensors",
        {"words": "some"},
    )
    return folder


def same_numbers(path: Path, loaded: object) -> bool:
    """safetensors itself finds the same in the file that we took for good."""
    assert isinstance(loaded, dict)
    try:
        expected = load_file(path)
    except SafetensorError:
        return False
    return loaded.keys() == expected.keys() and all(
        loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
        for name, tensor in expected.items()
    )


def stored(network: object) -> dict[str, Tensor]:
    assert isinstance(network, nn.Module)
    return {name.removeprefix("text_model."): t for name, t in network.state_dict().items()}


def same_weights(file: str) -> Callable[[Path, object], bool]:
    """What was loaded are the weights of `file`, whatever the configuration says besides."""

    def right(path: Path, loaded: object) -> bool:
        network = loaded.model if isinstance(loaded, TextEncoder) else loaded
        tensors = load_file(path.parents[1] / file)
        expected = {name.removeprefix("text_model."): t for name, t in tensors.items()}
        found = loaded if isinstance(loaded, dict) else stored(network)
        return found.keys() == expected.keys() and all(
            torch.equal(found[name], tensor) for name, tensor in expected.items()
        )

    return right


def always(path: Path, loaded: object) -> bool:
    return True


NOISE = {"beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type"}
GRID = {"timestep_spacing", "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr"}


def same_diffusion(path: Path, loaded: object) -> bool:
    """What the file says of noise, prediction and timesteps is what would be written again."""
    assert isinstance(loaded, Diffusion)
    said, written = load_json(path), loaded.to_scheduler_config()
    return all(said.get(key, written[key]) == written[key] for key in NOISE | GRID)


def read_diffusion(path: Path) -> object:
    return Diffusion.from_scheduler_config(load_scheduler_config(path.parents[1]))


WEIGHTS = {
    "unet": f"unet/{STEM}.safetensors",
    "vae": f"vae/{STEM}.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
TARGETS = {
    "header": Target("few.safetensors", broken_safetensors, load_safetensors, same_numbers),
    "index": Target(
        f"shards/{STEM}.safetensors.index.json",
        any_json,
        lambda path: load_weights(path.parent, STEM),
        same_weights(WEIGHTS["unet"]),
    ),
    "model_index": Target(
        "model_index.json", any_json, lambda path: check_pipeline_folder(path.parent), always
    ),
    "scheduler": Target(
        "scheduler/scheduler_config.json", any_json, read_diffusion, same_diffusion
    ),
    "unet": Target(
        "unet/config.json",
        any_json,
        lambda path: UNet.from_pretrained(path.parent),
        same_weights(WEIGHTS["unet"]),
    ),
    "vae": Target(
        "vae/config.json",
        any_json,
        lambda path: VAE.from_pretrained(path.parent),
        same_weights(WEIGHTS["vae"]),
    ),
    "text_encoder": Target(
        "text_encoder/config.json",
        any_json,
        lambda path: TextEncoder.from_pretrained(path.parents[1]),
        same_weights(WEIGHTS["text_encoder"]),
    ),
    "single_file": Target(
        "single.safetensors", broken_safetensors, Pipeline.from_single_file, always
    ),
    "metadata": Target("single.safetensors", broken_metadata, Pipeline.from_single_file, always),
    "yaml": Target("single.yaml", broken_yaml, load_ldm_config, always),
    "adapter": Target(
        "lora/adapter_config.json",
        any_json,
        lambda path: read_lora(path.with_name(LORA), layers_per_block=1),
        always,
    ),
}
# How many of each: the quick ones more often.
FEW = {
    "header": 250,
    "index": 60,
    "model_index": 60,
    "scheduler": 60,
    "unet": 30,
    "vae": 20,
    "text_encoder": 10,
    "single_file": 5,
    "metadata": 5,
    "yaml": 60,
    "adapter": 30,
}
MANY = {
    "header": 5000,
    "index": 1500,
    "model_index": 1200,
    "scheduler": 1200,
    "unet": 600,
    "vae": 400,
    "text_encoder": 150,
    "single_file": 100,
    "metadata": 100,
    "yaml": 600,
    "adapter": 300,
}


def tree(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file in the folders with its size and the time of its last change."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def places(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folder that is the current one, and the one for temporary files."""
    for name in ("cwd", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "cwd", tmp_path / "scratch"


def fuzz(name: str, count: int, model: Path, places: tuple[Path, Path]) -> dict[str, int]:
    """Break and read one file again and again; how often it was loaded and refused."""
    target = TARGETS[name]
    path = model / target.file
    content = path.read_bytes()
    counts = {"loaded": 0, "refused": 0}
    target.read(path)  # what is imported and kept at the first time is not the file's doing
    with at_most_more_memory(MEMORY):
        for i in range(count):
            case = f"{name} {i}"
            path.write_bytes(target.broken(content, Random(case)))
            before = tree(model.parent, *places)
            try:
                with watched(seconds=SECONDS, scratch=places[1]) as events:
                    loaded = target.read(path)
            except Exception as error:
                # Ours, in a sentence: not json's, torch's or a UnicodeError, which are ValueErrors.
                if type(error) is not ValueError or not 0 < len(str(error)) < 3000:
                    raise AssertionError(
                        f"{case}: {type(error).__name__}: {error!s:.500}"
                    ) from error
                counts["refused"] += 1
            else:
                assert target.right(path, loaded), f"{case}: loaded something else"
                counts["loaded"] += 1
            assert not events, f"{case}: {events}"
            assert tree(model.parent, *places) == before, case
    path.write_bytes(content)
    return counts


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # warnings of what is assumed about a file
@pytest.mark.parametrize("name", TARGETS)
def test_a_broken_file_is_loaded_right_or_refused(
    model: Path, places: tuple[Path, Path], name: str
) -> None:
    counts = fuzz(name, FEW[name], model, places)
    assert sum(counts.values()) == FEW[name]
    assert counts["refused"] > 0


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_broken_files_are_loaded_right_or_refused(
    model: Path, places: tuple[Path, Path]
) -> None:
    start = time.perf_counter()
    total = 0
    for name, count in MANY.items():
        began = time.perf_counter()
        counts = fuzz(name, count, model, places)
        total += count
        print(f"{name}: {counts}, {time.perf_counter() - began:.1f} s")
        assert counts["refused"] > 0, name
    print(f"{total} cases in {time.perf_counter() - start:.1f} s")
    assert total >= 10_000


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.SafeTensors", "model.SAFETENSORS", "model.bin", "model.ckpt"],
)
def test_a_pickle_is_never_opened_whatever_it_is_called(
    model: Path, places: tuple[Path, Path], name: str
) -> None:
    """InvokeAI took .SafeTensors for a pickle's name and opened it."""
    cwd, scratch = places
    canary, path = scratch / "canary", cwd / name
    for content in canaries(canary):
        path.write_bytes(content)
        for read in (load_safetensors, Pipeline.from_pretrained, Pipeline.from_single_file):
            with (
                watched(seconds=SECONDS, scratch=scratch) as events,
                pytest.raises(ValueError, match=name),
            ):
                read(path)
            assert not events
    assert not canary.exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    "ending", [".safetensors", ".bin", ".fp16.safetensors", ".pt", ".SafeTensors"]
)
def test_a_pickle_in_a_folder_is_never_opened(
    model: Path, places: tuple[Path, Path], part: str, ending: str
) -> None:
    cwd, scratch = places
    shutil.copytree(model, cwd / "model")
    weights = cwd / "model" / WEIGHTS[part]
    weights.unlink()
    for content in canaries(scratch / "canary"):
        weights.with_suffix(ending).write_bytes(content)
        with (
            watched(seconds=SECONDS, scratch=scratch) as events,
            pytest.raises(ValueError, match=part),
        ):
            Pipeline.from_pretrained(cwd / "model", variant="fp16" if "fp16" in ending else None)
        assert not events
    assert not (scratch / "canary").exists()


def test_the_watch_notices_what_it_is_for(places: tuple[Path, Path]) -> None:
    cwd, scratch = places
    with watched(seconds=SECONDS, scratch=scratch) as events:
        (scratch / "allowed").write_text("")
        (cwd / "written").write_text("")
        pickle.loads(canaries(cwd / "made")[2])
    assert [event.split()[0] for event in events] == ["open", "pickle.find_class", "os.mkdir"]
    with (
        pytest.raises(AssertionError, match="still reading"),
        watched(seconds=0.05, scratch=scratch),
    ):
        time.sleep(1)
    with pytest.raises(RuntimeError, match="alloc"), at_most_more_memory(MEMORY):
        torch.empty(16 * MEMORY, dtype=torch.uint8)  # what earlier tests leave may be freed now
