"""Models of the Hugging Face Hub from its cache, offline; what is fetched and what is never."""

import hashlib
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from support.parity import same_weights
from support.tiny import CONTEXT_DIM, tiny_pipeline

from latentdiff.formats import hub
from latentdiff.formats.diffusers import STEMS, check_pipeline_folder, find_model
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.pipeline import Pipeline

pytestmark = pytest.mark.interchange

HUB_ID = "somebody/tiny-diffusion"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """A model for each revision."""
    scratch = tmp_path_factory.mktemp("tokenizer")
    return {name: tiny_pipeline(scratch, seed=i) for i, name in enumerate(COMMITS)}


@pytest.fixture
def cache(pipelines: dict[str, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub's cache as its downloads leave it: refs, snapshots of links, blobs."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for revision, pipeline in pipelines.items():
        folder = tmp_path / revision
        pipeline.save_pretrained(folder)
        if revision == "main":  # only the UNet has a variant
            unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
            pipeline.unet.save_pretrained(tmp_path / "half", dtype=torch.float16)
            shutil.copy(tmp_path / "half" / unet.name, unet.with_suffix(".fp16.safetensors"))
        (repository / "refs" / revision).write_text(COMMITS[revision])
        for path in folder.rglob("*"):
            if path.is_file():
                add(repository, COMMITS[revision], path.relative_to(folder), path.read_bytes())
    return repository


@pytest.fixture
def dit(pipelines: dict[str, Pipeline], tmp_path: Path) -> Path:
    """The folder of a pipeline with a DiT, which has its weights in float16 as well."""
    of = pipelines["main"]
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    network = DiT(DiTConfig(sample_size=8, cross_attention_dim=CONTEXT_DIM, **size))
    whole = Pipeline(unet=network, vae=of.vae, text_encoder=of.text_encoder, diffusion=of.diffusion)
    folder = tmp_path / "dit"
    whole.save_pretrained(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    network.save_pretrained(tmp_path / "half", dtype=torch.float16)
    shutil.copy(tmp_path / "half" / weights.name, weights.with_suffix(".fp16.safetensors"))
    return folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub that hands out the folder `dit`: where its downloads arrive."""
    import huggingface_hub

    arrived = tmp_path / "arrived"

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        source = tmp_path / "dit"
        for path in source.rglob("*"):
            name = path.relative_to(source)
            if path.is_file() and any(fnmatch(name.as_posix(), p) for p in allow_patterns):
                (arrived / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, arrived / name)
        return str(arrived)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return arrived


def add(repository: Path, commit: str, name: Path, content: bytes) -> None:
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    link = repository / "snapshots" / commit / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))


def test_a_hub_id_is_read_from_the_cache_when_offline(
    cache: Path, pipelines: dict[str, Pipeline]
) -> None:
    loaded = Pipeline.from_pretrained(HUB_ID)
    for name in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(loaded, name), getattr(pipelines["main"], name))


@pytest.mark.parametrize("revision", ["v1", COMMITS["v1"]])
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    cache: Path, pipelines: dict[str, Pipeline], revision: str
) -> None:
    loaded = Pipeline.from_pretrained(HUB_ID, revision=revision)
    assert same_weights(loaded.unet, pipelines["v1"].unet)


def test_a_variant_is_read_where_there_is_one_and_plain_weights_elsewhere(
    cache: Path, pipelines: dict[str, Pipeline]
) -> None:
    folder = find_model(HUB_ID, variant="fp16")
    chosen = check_pipeline_folder(folder, variant="fp16")
    assert chosen == {"unet": "fp16", "vae": None, "text_encoder": None}
    loaded = Pipeline.from_pretrained(HUB_ID, variant="fp16")
    assert same_weights(loaded.vae, pipelines["main"].vae)
    expected = pipelines["main"].unet.conv_in.weight.half().float()
    assert torch.equal(loaded.unet.conv_in.weight, expected)


def test_a_missing_variant_is_refused_in_one_sentence_with_those_that_are_there(
    cache: Path,
) -> None:
    with pytest.raises(
        ValueError, match=r"no weights of variant='ema'; variants found: fp16, plain;"
    ):
        find_model(HUB_ID, variant="ema")
    with pytest.raises(ValueError, match="no weights of variant='fp16'; variants found: plain;"):
        find_model(HUB_ID, variant="fp16", revision="v1")


@pytest.mark.parametrize("revision", ["v2", "c" * 40])
def test_a_revision_that_is_not_in_the_cache_is_named(cache: Path, revision: str) -> None:
    with pytest.raises(ValueError, match=f"at revision {revision} could not be fetched"):
        find_model(HUB_ID, revision=revision)


def test_shards_are_links_into_the_cache_and_nowhere_else(cache: Path) -> None:
    """A shard may not be a link out of its folder, but in the cache each file is one."""
    from diffusers import UNet2DConditionModel

    snapshot = cache / "snapshots" / COMMITS["main"]
    reference = UNet2DConditionModel.from_pretrained(snapshot / "unet")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    written = cache.parent / "written"
    reference.save_pretrained(written, max_shard_size="20KB")
    for path in written.glob("*model*"):
        add(cache, COMMITS["main"], Path("unet") / path.name, path.read_bytes())
    loaded = Pipeline.from_pretrained(HUB_ID)
    assert same_weights(loaded.unet, reference)
    shard = next(snapshot.glob("unet/*-of-*.safetensors"))
    shard.unlink()
    shard.symlink_to(written / shard.name)
    with pytest.raises(ValueError, match="is a link to outside its folder"):
        Pipeline.from_pretrained(HUB_ID)


def test_a_repository_of_pickles_is_refused_with_the_command_that_converts_them(
    cache: Path,
) -> None:
    snapshot = cache / "snapshots" / COMMITS["main"]
    for path in snapshot.rglob("*.safetensors"):
        path.unlink()
    (snapshot / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"as pickles.*`latentdiff convert --unsafe_pickle`"):
        find_model(HUB_ID)


def test_a_dit_is_read_from_the_cache_when_offline(cache: Path, dit: Path) -> None:
    """Only unet/ was looked for, so that a DiT's pipeline lacked its weights."""
    snapshot = cache / "snapshots" / COMMITS["main"]
    shutil.rmtree(snapshot)
    for path in dit.rglob("*"):
        if path.is_file():
            add(cache, COMMITS["main"], path.relative_to(dit), path.read_bytes())
    loaded = Pipeline.from_pretrained(HUB_ID)
    assert same_weights(loaded.unet, DiT.from_pretrained(dit / "transformer"))
    with pytest.raises(
        ValueError, match="no weights of variant='ema'; variants found: fp16, plain"
    ):
        find_model(HUB_ID, variant="ema")
    for path in snapshot.glob("transformer/*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="missing: transformer/diffusion_pytorch_model"):
        Pipeline.from_pretrained(snapshot)
    with pytest.raises(ValueError, match="has no plain weights"):
        find_model(HUB_ID)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_a_dit_the_transformer_is_fetched_and_of_another_pipeline_not(
    dit: Path, downloads: Path, variant: str | None
) -> None:
    """Those of other makers take gigabytes, and would be refused after them."""
    folder = find_model(HUB_ID, variant=variant)
    chosen = check_pipeline_folder(folder, variant=variant)
    assert chosen == {"transformer": variant, "vae": None, "text_encoder": None}
    fetched = {path.name for path in downloads.glob("transformer/*.safetensors")}
    dotted = "" if variant is None else f".{variant}"
    assert fetched == {f"diffusion_pytorch_model{dotted}.safetensors"}

    shutil.rmtree(downloads)
    index = dit / "model_index.json"
    other = index.read_text().replace("latentdiff.models.dit", "diffusers")
    index.write_text(other)
    with pytest.raises(ValueError, match="no "):
        find_model(HUB_ID, variant=variant)
    assert not list(downloads.glob("transformer/*.safetensors"))


REPOSITORY = [
    "README.md",
    "model_index.json",
    "pipeline.py",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer/tokenization_evil.py",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]


@pytest.mark.parametrize(("variant", "weights"), [(None, 4), ("fp16", 5), ("non_ema", 1)])
def test_only_what_is_read_is_fetched(variant: str | None, weights: int) -> None:
    """SD 1.5's repository and a few files more: the plain weights, or those of the variant."""
    patterns = hub.patterns(STEMS, variant)
    fetched = [name for name in REPOSITORY if any(fnmatch(name, pattern) for pattern in patterns)]
    others = [name for name in fetched if not name.endswith(".safetensors")]
    assert set(others) == {
        name for name in REPOSITORY if name.endswith(".json") or name == "tokenizer/merges.txt"
    }
    assert len(fetched) - len(others) == weights
    for name in fetched:
        if name.endswith(".safetensors"):
            assert name.split("/")[0] in STEMS
            assert f".{variant}" in name if variant else name.count(".") == 1
