"""Prior preservation: own and class images as often, weighted, and the same after a break."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.scripts import TWO, config_class, launch, run_here
from support.tiny import tiny_pipeline
from test_cache import data_config, vae, write, write_images

from latentdiff.data.batches import batches
from latentdiff.data.cache import LatentCache
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.joined import (
    MAX_EXAMPLES,
    Chosen,
    JoinedLatents,
    as_often,
    collate_joined,
)
from latentdiff.data.resident import ResidentLatents
from latentdiff.formats.weights import load_safetensors
from latentdiff.tasks.denoiser.class_images import join_class_images
from latentdiff.tasks.denoiser.latents import open_cache
from latentdiff.tasks.denoiser.start import load_init, make_start, start_vae
from latentdiff.tasks.denoiser.task import DenoiserTask
from latentdiff.training.command_line import parse_config
from latentdiff.training.randomness import MicroBatch
from latentdiff.training.run import Run

PROMPT = "a dog"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@given(n=st.integers(1, 500), m=st.integers(1, 500))
def test_both_kinds_come_as_often_and_so_do_the_images_of_each(n: int, m: int) -> None:
    indices = as_often(np.arange(n), n + np.arange(m))
    own, classes = indices[indices < n], indices[indices >= n]
    assert len(own) == len(classes)
    counts = [Counter(kind.tolist()) for kind in (own, classes)]
    assert [len(count) for count in counts] == [n, m]
    for count in counts:
        spread = max(count.values()) - min(count.values())
        assert spread == 0 or (spread == 1 and len(own) == max(n, m, MAX_EXAMPLES))


@pytest.fixture
def joined(tmp_path: Path) -> JoinedLatents:
    """Thirteen own images of three sizes, of which two are held out, and seven class images."""
    for name, count in (("own", 13), ("classes", 7)):
        write_images(tmp_path / name, count)
        data = CaptionedImages(data_config(tmp_path / name))
        write(tmp_path / f"{name}_cache", data, vae())
    own, classes = LatentCache(tmp_path / "own_cache"), LatentCache(tmp_path / "classes_cache")
    return JoinedLatents(own, classes, val=np.array([0, 5]), class_weight=0.5)


def test_held_out_images_are_never_trained_on(joined: JoinedLatents) -> None:
    assert sorted(set(joined.examples.tolist())) == [
        row for row in range(len(joined)) if row not in (0, 5)
    ]
    assert joined.loss_weights.tolist() == [1.0] * 13 + [0.5] * 7
    assert len(joined.captions) == len(joined) == 20


def test_latents_in_memory_are_those_on_disk(joined: JoinedLatents) -> None:
    """And both kinds share the batches of a size."""

    def variants(step: int) -> list[int]:
        return [(step + i) % joined.crop_flip.num_variants for i in range(4)]

    options: dict[str, Any] = {"batch_size": 4, "seed": 1, "stop": 60, "variants": variants}
    train = Chosen(joined, joined.examples)
    read = batches(
        train,
        5,
        num_samples=len(train),
        buckets=joined.buckets[joined.examples],
        collate=collate_joined,
        **options,
    )
    resident = ResidentLatents(joined, torch.device("cpu"))
    held = list(resident.batches(5, examples=joined.examples, **options))
    kinds = Counter[bool]()
    for found, expected in zip(held, read, strict=True):
        assert found["moments"].equal(expected["moments"])
        assert found["rows"].tolist() == expected["rows"].tolist()
        assert [joined.captions[row] for row in found["rows"]] == expected["captions"]
        kinds.update((found["rows"] >= 13).tolist())
    assert len({batch["moments"].shape for batch in held}) == 3
    assert abs(kinds[True] - kinds[False]) < 0.2 * kinds.total()


# ----- the script -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    tiny_pipeline(folder / "scratch").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Six images without captions, half of them wide."""
    folder = tmp_path / "own"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (8, 32, 3) if i % 2 else (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def options(init: Path, own: Path, run: Path, *args: str) -> list[str]:
    return [
        *(f"--init={init}", f"--data={own}", f"--output_dir={run}", f"--class_prompt={PROMPT}"),
        *('--instance_prompts=["a sks dog", "sks"]', "--num_class_images=5", "--image_size=16"),
        *("--batch_size=4", "--mixed_precision=no", "--warmup_steps=1", "--cooldown_steps=0"),
        *("--learning_rate=1e-4", "--preview_every=99", "--checkpoint_every=99", "--max_steps=4"),
        *("--val_fraction=0.2", "--preview_prompts=[sks]", "--bucket_step=8", "--max_aspect=4"),
        *args,
    ]


def train(init: Path, own: Path, run: Path, *args: str) -> None:
    run_here("train_unet", *options(init, own, run, *args))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_safetensors(run / "checkpoints" / "step-4" / "unet.safetensors")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.training
def test_a_run_that_was_killed_while_drawing_and_while_training_ends_the_same(
    init: Path, own: Path, tmp_path: Path
) -> None:
    train(init, own, tmp_path / "whole")
    train(init, own, tmp_path / "broken", "--max_steps=2")
    train(init, own, tmp_path / "broken")
    train(init, own, tmp_path / "held", "--in_memory=true")
    drawn = files(tmp_path / "whole" / "class_images")
    assert sorted(drawn) == [*(f"0000{i}.png" for i in range(5)), "made_of.json", "metadata.jsonl"]
    # Killed while it drew: one image and what is written last are not there.
    killed = tmp_path / "killed" / "class_images"
    killed.mkdir(parents=True)
    for name in ("00000.png", "00003.png", "made_of.json"):
        (killed / name).write_bytes(drawn[name])
    train(init, own, tmp_path / "killed")
    expected = weights(tmp_path / "whole")
    for name in ("broken", "held", "killed"):
        assert files(tmp_path / name / "class_images") == drawn
        found = weights(tmp_path / name)
        assert [key for key in expected if not found[key].equal(expected[key])] == []
    data = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert data["samples"] == 6
    assert data["num_val"] == 1
    assert data["class_images"] == {
        "caption": PROMPT,
        "images": 5,
        "folder": str(tmp_path / "whole" / "class_images"),
        "loss_weight": 1.0,
    }


def opened(args: Sequence[str]) -> tuple[DenoiserTask, Run]:
    """The task of a run, as the script makes it."""
    config, settings = parse_config(config_class("train_unet"), args)
    run = Run(config, settings)
    init = load_init(config, print)
    assert init is not None
    cache, encoder = open_cache(config, run, lambda data: start_vae(config, init, data, print))
    val = np.array([1])
    prior = join_class_images(config, run, init, cache=cache, val=val, vae=encoder)
    text_encoder = init.text_encoder
    model = make_start(config, init, cache=cache, vae=encoder, text_encoder=text_encoder, say=print)
    task = DenoiserTask(config, run, cache=cache, val=val, model=model, prior=prior)
    return task, run


@pytest.fixture
def task(init: Path, own: Path, tmp_path: Path) -> Iterator[DenoiserTask]:
    args = options(
        *(init, own, tmp_path / "run"),
        *("--prior_loss_weight=3", "--ema_decay=0", "--preview_prompts=[]"),
    )
    task, run = opened(args)
    with run.folder:
        yield task


@pytest.mark.training
def test_the_gradient_is_half_of_the_own_mean_plus_the_weighted_class_mean(
    task: DenoiserTask,
) -> None:
    """DreamBooth's eq. 2, where diffusers' loss is twice ours."""
    prior = task.prior
    assert prior is not None
    rows = np.array([0, 2, len(prior.own), len(prior.own) + 1])  # two own and two of the class
    moments = [prior[int(row), 0]["moments"] for row in rows]
    captions = [prior.captions[row] for row in rows]
    batch = task.prepare({"moments": torch.stack(moments), "captions": captions, "rows": rows}, 0)
    x0 = batch["moments"][:, :4] + batch["moments"][:, 4:].div(2).exp() * batch["posterior"]
    context = task.captions.context(batch["caption"])
    network = task.learner.model
    errors = task.diffusion.loss(network, x0, context, noise=batch["noise"], t=batch["t"])
    loss = (errors[:2].mean() + 3 * errors[2:].mean()) / 2
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    expected = torch.stack([one.norm() for one in gradients]).norm()
    found = task.step(batch, 0, MicroBatch())["grad_norm"]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.training
def test_class_images_have_the_sizes_of_the_images_that_are_trained_on(task: DenoiserTask) -> None:
    prior = task.prior
    assert prior is not None
    wanted = np.resize(np.delete(prior.own.buckets, task.val), 5)
    assert prior.classes.buckets.tolist() == wanted.tolist()
    assert len(set(wanted.tolist())) == 2
    assert list(prior.classes.captions) == [[PROMPT]] * 5


@pytest.mark.training
def test_the_preview_shows_the_subject_and_the_class(task: DenoiserTask) -> None:
    assert task._preview_prompts() == ["a sks dog", "sks", PROMPT]


@pytest.mark.training
def test_images_of_ones_own_are_not_drawn(init: Path, own: Path, tmp_path: Path) -> None:
    args = options(
        *(init, own, tmp_path / "run", f"--class_data={own}", "--prior_loss_weight=0.5"),
    )
    task, run = opened([arg for arg in args if "num_class" not in arg])
    with run.folder:
        assert task.prior is not None
        assert list(task.prior.classes.captions) == [[PROMPT]] * 6
        assert not (tmp_path / "run" / "class_images").exists()


@pytest.mark.training
def test_a_cache_that_is_given_is_joined_as_one_that_the_run_made(
    task: DenoiserTask, init: Path, tmp_path: Path
) -> None:
    given = tmp_path / "run" / "cache"
    args = options(init, given, tmp_path / "again", f"--cache={given}", "--num_workers=0")
    of_data = ("--data", "--image_size", "--bucket_step", "--max_aspect", "--instance_prompts")
    again, run = opened([arg for arg in args if arg.partition("=")[0] not in of_data])
    with run.folder:
        assert again.prior is not None
        assert task.prior is not None
        assert again.prior.fingerprint == task.prior.fingerprint
        assert again._preview_prompts() == task._preview_prompts()


@pytest.mark.processes
def test_two_processes_draw_the_images_of_one(init: Path, own: Path, tmp_path: Path) -> None:
    launch(TWO, "train_unet", *options(init, own, tmp_path / "two", "--max_steps=1"))
    train(init, own, tmp_path / "one", "--max_steps=1")
    one, two = (files(tmp_path / name / "class_images") for name in ("one", "two"))
    assert one == two


@pytest.mark.training
def test_class_images_are_painted_too(init: Path, own: Path, tmp_path: Path) -> None:
    args = options(init, own, tmp_path / "run", "--inpainting=true", "--masks=2")
    task, run = opened([arg for arg in args if "preview_prompts" not in arg])
    with run.folder:
        prior = task.prior
        assert prior is not None
        assert prior.classes.crop_flip.masks == 2
        rows = np.array([0, len(prior.own)])
        moments = torch.stack([prior[int(row), 1]["moments"] for row in rows])
        captions = [prior.captions[row] for row in rows.repeat(2)]
        batch = {"moments": moments.repeat_interleave(2, 0), "captions": captions}
        metrics = task.step(task.prepare(batch | {"rows": rows.repeat(2)}, 0), 0, MicroBatch())
        assert metrics["loss"].isfinite()


@pytest.mark.training
def test_class_images_of_another_prompt_are_refused(
    init: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "class_images"
    folder.mkdir(parents=True)
    (folder / "made_of.json").write_text('{"prompt": "a cat"}')
    with pytest.raises(SystemExit, match="2"):
        train(init, own, tmp_path / "run")
    said = capsys.readouterr().err
    assert f"{folder} has class images of another model and prompt and sizes" in said
    assert "name them as class_data" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--class_prompt=dog", "class_prompt=dog has no effect with init=null"),
        ("--init=emoji --num_class_images=9", "num_class_images=9 has no effect with class_promp"),
        ("--init=emoji --prior_loss_weight=2", "prior_loss_weight=2.0 has no effect with class_p"),
        (
            "--init=emoji --class_prompt=dog --class_data=there --num_class_images=9",
            "num_class_images=9 has no effect with class_data=there",
        ),
        ("--init=emoji --class_prompt=dog --num_class_images=0", "num_class_images=0 must be at"),
        ("--init=emoji --class_prompt=dog --prior_loss_weight=0", "prior_loss_weight=0.0 must be"),
    ],
)
def test_what_has_no_effect_or_is_impossible_is_one_sentence(args: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_config(config_class("train_unet"), args.split())
    assert "\n" not in str(caught.value)
