"""What train_vae.py does to its images, and what it trains beside the full network or instead."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.backbones import write_backbone
from support.scripts import TWO, launch, run_here
from torch import Tensor

from latentdiff.data.shapes import build_shapes
from latentdiff.formats.weights import load_json
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.options import compose
from latentdiff.tasks.vae.config import TrainVAE
from latentdiff.tasks.vae.task import mirror
from latentdiff.training.checkpoint import StoredTensors
from latentdiff.training.randomness import MicroBatch, generator


def test_about_half_of_the_images_are_mirrored_whoever_works_on_them() -> None:
    images = torch.rand(64, 3, 2, 4)
    u = torch.rand(64, generator=generator(0, 5, "flip"))
    found = mirror(images, u)
    turned = [not torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    assert 20 < sum(turned) < 44
    for before, after, was_turned in zip(images, found, turned, strict=True):
        assert torch.equal(after, before.flip(-1) if was_turned else before)
    slices = [MicroBatch(index, 4) for index in range(4)]
    alone = [mirror(one.rows(images), one.rows(u)) for one in slices]
    assert torch.equal(torch.cat(alone), found)


NETWORK = "--vae.block_out_channels=[8,16] --vae.norm_num_groups=4 --vae.layers_per_block=1"
SHORT = "--image_size=32 --batch_size=4 --warmup_steps=1 --cooldown_steps=0 --max_steps=4"
REST = "--log_every=1 --checkpoint_every=2 --mixed_precision=no --disc_weight=0.5 --disc_start=1"
ARGUMENTS = f"{NETWORK} {SHORT} {REST}".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "data"
    build_shapes(folder, count=20, seed=0, size=32)
    return folder


def train(images: Path, run: Path, *more: str) -> list[dict[str, float]]:
    """Run the script in this process; its log."""
    run_here("train_vae", *arguments(images, run, *more))
    return log(run)


def arguments(images: Path, run: Path, *more: str) -> list[str]:
    """The command line; an option of a discriminator that is not there would be refused."""
    given = [*ARGUMENTS, f"--data={images}", f"--output_dir={run}", *more]
    without = "--disc_weight=0" in more
    return [arg for arg in given if not (without and arg.startswith("--disc_start="))]


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def stored(run: Path, step: int, name: str) -> dict[str, Tensor]:
    return dict(StoredTensors(run / "checkpoints" / f"step-{step}", name))


def weights(run: Path, step: int, name: str) -> dict[str, Tensor]:
    found = stored(run, step, name)
    return {key: tensor for key, tensor in found.items() if key.startswith("model.")}


def gradients_of(run: Path, name: str) -> dict[str, Tensor]:
    """The gradients of a run's only step: its optimizer has a tenth of them."""
    found = stored(run, 1, name)
    ending = ".exp_avg"
    return {key.removesuffix(ending): 10 * t for key, t in found.items() if key.endswith(ending)}


@pytest.mark.training
def test_a_vae_with_its_discriminator_resumes_bit_for_bit(images: Path, tmp_path: Path) -> None:
    records = train(images, tmp_path / "straight", "--learn_logvar=true")
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-4")
    again = train(images, tmp_path / "resumed", "--learn_logvar=true")
    for name in ("vae", "discriminator", "logvar"):
        found, expected = (
            dict(StoredTensors(tmp_path / run / "checkpoints" / "step-4", name))
            for run in ("resumed", "straight")
        )
        assert {k: t.equal(expected[k]) for k, t in found.items()} == dict.fromkeys(expected, True)
        assert any(key.startswith("ema.") for key in expected) == (name == "vae")
    assert [r["disc_loss"] for r in again[1:]] == [r["disc_loss"] for r in records[1:]]
    assert "disc_loss" not in records[0]  # which begins after a step
    assert all(key in records[1] for key in ("adversarial", "grad_norm_disc", "disc_real"))
    for record in records:
        assert record["loss"] == pytest.approx(record["pixel_nats"] + 1e-3 * record["kl"])
    facts = load_json(tmp_path / "straight" / "model" / "training.json")
    assert facts == load_json(tmp_path / "resumed" / "model" / "training.json")
    assert facts["reconstruction"] == "l1"
    assert facts["logvar"] == float(stored(tmp_path / "straight", 4, "logvar")["model.logvar"]) < 0
    assert facts.keys() >= {"disc_real", "disc_fake", "disc_loss"}


@pytest.mark.training
def test_neither_step_takes_the_others_gradients(images: Path, tmp_path: Path) -> None:
    """As both do in diffusers' script for autoencoders once its discriminator has started.

    However much the VAE minds its scores, the discriminator's first step is the same; and where it
    minds them by nothing that counts, its own first step is that without a discriminator.
    """
    after = {}
    for disc_weight in ("0", "1e-30", "0.5"):
        run = tmp_path / disc_weight
        options = [f"--disc_weight={disc_weight}", "--disc_start=0", "--max_steps=1"]
        train(images, run, *options)
        names = ("vae",) if disc_weight == "0" else ("vae", "discriminator")
        after[disc_weight] = {name: weights(run, 1, name) for name in names}

    def same(name: str, one: str, other: str) -> bool:
        pairs = zip(after[one][name].values(), after[other][name].values(), strict=True)
        return all(a.equal(b) for a, b in pairs)

    assert same("discriminator", "1e-30", "0.5")
    assert same("vae", "0", "1e-30")
    assert not same("vae", "0", "0.5")


@pytest.mark.training
def test_a_discriminator_that_never_begins_is_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(images, tmp_path / "run", "--disc_start=4")
    said = "disc_start=4 is not before max_steps=4: no step has the adversarial loss"
    assert said in capsys.readouterr().out
    train(images, tmp_path / "other", "--disc_start=3")
    assert "no step has" not in capsys.readouterr().out


@pytest.mark.processes
def test_two_processes_train_both_as_one_does(images: Path, tmp_path: Path) -> None:
    alone = train(images, tmp_path / "one", "--learn_logvar=true")
    train_in_two(images, tmp_path / "two", "--learn_logvar=true")
    for found, expected in zip(log(tmp_path / "two"), alone, strict=True):
        for name in found.keys() - {"samples_per_second", "data_wait", "memory"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    for name in ("vae", "discriminator", "logvar"):
        assert_near(*(weights(tmp_path / run, 4, name) for run in ("two", "one")))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same weights up to sums in another order, which AdamW makes most of."""
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4, msg=key)


def train_in_two(images: Path, run: Path, *more: str) -> None:
    """Run the script in two processes."""
    launch(TWO, "train_vae", *arguments(images, run, *more))


@pytest.mark.training
def test_the_perceptual_gradient_reaches_every_layer(images: Path, tmp_path: Path) -> None:
    """In diffusers' script LPIPS is computed without gradients: it is logged and changes nothing.

    Here the gradients of a step are those without it and its own by its weight, in the decoder and
    in the encoder alike.
    """
    path = write_backbone(tmp_path / "alexnet.safetensors", "alexnet")
    options = ["--disc_weight=0", "--max_steps=1", "--max_grad_norm=1e9"]
    gradients, records = [], []
    for weight in (0.0, 1.0, 2.0):
        run = tmp_path / str(weight)
        more = [f"--perceptual_weight={weight}", f"--perceptual_weights={path}"] if weight else []
        records += train(images, run, *options, *more)
        gradients.append(gradients_of(run, "vae"))
        assert [file.stem for file in run.glob("checkpoints/*/*.safetensors")] == ["vae"]
    without, with_one, with_two = gradients
    for name, gradient in without.items():
        own = with_one[name] - gradient
        assert own.norm() > 0, name
        torch.testing.assert_close(with_two[name] - gradient, 2 * own, rtol=1e-3, atol=1e-5)
    assert any(name.startswith("optimizer.encoder.conv_in") for name in without)
    assert any(name.startswith("optimizer.decoder.conv_out") for name in without)
    assert records[2]["loss"] == pytest.approx(records[0]["loss"] + 2 * records[2]["perceptual"])
    write_backbone(path, "alexnet", seed=1)  # another one under the same name
    with pytest.raises(SystemExit):
        train(images, tmp_path / "2.0", *options, *more, "--max_steps=2")


DECODER_ONLY = ["--decoder_only=true", "--disc_weight=0", "--init"]


@pytest.mark.training
def test_a_new_decoder_leaves_the_latents_as_they_were(images: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "start", "--disc_weight=0")
    start = tmp_path / "start" / "model"
    records = train(images, tmp_path / "more", *DECODER_ONLY, str(start))
    before, after = VAE.from_pretrained(start), VAE.from_pretrained(tmp_path / "more" / "model")
    images = 2 * torch.rand(4, 3, 32, 32) - 1
    moments_before, moments_after = before.encode(images), after.encode(images)
    assert moments_after.mean.equal(moments_before.mean)
    assert moments_after.logvar.equal(moments_before.logvar)
    trained = set()
    for name, tensor in after.state_dict().items():
        if tensor.equal(before.state_dict()[name]):
            assert name.startswith(("encoder.", "quant_conv."))
        else:
            trained.add(name)
    assert trained == {n for n in after.state_dict() if n.startswith(("decoder.", "post_quant_"))}
    kept = {key for key in stored(tmp_path / "more", 4, "vae") if key.startswith("optimizer.")}
    assert {key.removeprefix("optimizer.").rpartition(".")[0] for key in kept} == trained
    assert all("kl" not in record and record["loss"] == record["l1"] for record in records)


@pytest.mark.training
def test_a_run_is_resumed_with_the_vae_that_it_began_with_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read again then: a folder that had changed in between gave another encoder."""
    train(images, tmp_path / "start", "--disc_weight=0", "--max_steps=1")
    given = tmp_path / "start" / "model"
    options = ["--disc_weight=0", f"--init={given}"]
    train(images, tmp_path / "more", *options, "--max_steps=1")
    assert train(images, tmp_path / "more", *options, "--max_steps=2")[-1]["step"] == 2
    other = VAE.from_pretrained(given)
    with torch.no_grad():
        other.decoder.conv_out.weight[0] += 1e-3
    other.save_pretrained(given)
    with pytest.raises(SystemExit):
        train(images, tmp_path / "more", *options, "--max_steps=3")
    assert "was made with another init than this run's" in capsys.readouterr().err


@pytest.mark.processes
def test_two_processes_train_a_decoder_as_one_does(images: Path, tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("start", "one", "two")}
    train(images, runs["start"], "--disc_weight=0", "--max_steps=1")
    options = [*DECODER_ONLY, str(runs["start"] / "model")]
    train(images, runs["one"], *options)
    train_in_two(images, runs["two"], *options)
    assert_near(weights(runs["two"], 4, "vae"), weights(runs["one"], 4, "vae"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"disc_weight": -1.0}, "disc_weight=-1.0 must not be negative"),
        (
            {"disc_weight": 0.5, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2 must be 1 with a disc_weight",
        ),
        ({"disc_weight": 0.5, "sharding": "full"}, "sharding='full' must be 'none' with a"),
        ({"perceptual_weight": 1.0}, "perceptual_weight=1.0 needs perceptual_weights, a safe"),
        ({"perceptual_weight": -1.0}, "perceptual_weight=-1.0 must not be negative"),
        ({"decoder_only": True}, "decoder_only=True needs init, the VAE whose latents are kept"),
        (
            {"decoder_only": True, "init": "emoji", "sharding": "zero2"},
            "sharding='zero2' must be 'none' or 'full' with decoder_only",
        ),
        ({"vae": VAEConfig(use_quant_conv=False)}, "^use_quant_conv=False must be true"),
        (
            {"vae": VAEConfig(encoder="downsample", latent_channels=3, use_post_quant_conv=False)},
            "^use_post_quant_conv=False must be true",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(option, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(TrainVAE, option)
