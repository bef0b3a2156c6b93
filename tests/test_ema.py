"""Power-function averages: what they are made of, and averages made of their snapshots."""

import hashlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import make_learner
from support.tiny import tiny_pipeline
from torch import Tensor, nn
from transformers import CLIPModel

from latentdiff.cli import main
from latentdiff.formats.weights import load_safetensors
from latentdiff.models.clip import CLIPSize, new_clip
from latentdiff.models.clip_text import CLIPText
from latentdiff.models.text import TextEncoder
from latentdiff.pipeline import Pipeline
from latentdiff.training.ema import LONGEST, power_decay, power_exponent
from latentdiff.training.ema_synthesis import (
    DTYPE,
    FILES,
    Synthesis,
    find_snapshots,
    save_snapshot,
    synthesize,
    write_model,
)
from latentdiff.training.learner import Learner

LENGTHS = (0.01, 0.05, 0.1, 0.2, 0.28)
STORED = ("0.05", "0.1")
ROUNDING = 2**-11  # relative, of float16: more snapshots do not help against it


def profile(length: float, updates: int) -> np.ndarray:
    """What the weights of each update have in the last average, by the rule of averaging alone."""
    gamma = power_exponent(length)
    decays = np.array([power_decay(update, gamma) for update in range(1, updates + 1)])
    later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    return (1 - decays) * later


class Walk:
    """Weights that walk at random, as trained ones nearly do, with their averages in float64."""

    def __init__(self, *lengths: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(1000, generator=self.generator, dtype=torch.float64)
        self.averages = {length: torch.zeros(1000, dtype=torch.float64) for length in lengths}
        self.updates = 0

    def step(self) -> None:
        noise = torch.randn(1000, generator=self.generator, dtype=torch.float64)
        self.weights += 0.05 * noise
        self.updates += 1
        for length, average in self.averages.items():
            decay = power_decay(self.updates, power_exponent(float(length)))
            average.lerp_(self.weights, 1 - decay)


def walk(
    folder: Path, *, every: int, lengths: tuple[str, ...] = (), updates: int = 480
) -> dict[str, Tensor]:
    """Averages after the walk; those of the stored lengths leave snapshots on the way."""
    toy = Walk(*STORED, *lengths)
    for _ in range(updates):
        toy.step()
        if toy.updates % every == 0:
            kept = {length: {"w": toy.averages[length]} for length in STORED}
            save_snapshot(folder, toy.updates, kept)
    return toy.averages


def only(synthesis: Synthesis) -> Tensor:
    ((_, tensor),) = synthesis.tensors(["w"])
    return tensor


def distance(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("length", LENGTHS)
def test_weights_of_an_update_count_as_the_integral_of_the_profile_over_it(length: float) -> None:
    a, updates = power_exponent(length) + 1, 300
    edges = (np.arange(updates + 1) / updates) ** a
    np.testing.assert_allclose(profile(length, updates), np.diff(edges), rtol=1e-9, atol=1e-15)


def test_weights_count_by_the_power_of_their_time() -> None:
    found, gamma = profile(0.1, 100_000), power_exponent(0.1)
    np.testing.assert_allclose(
        found[50_000:] / found[-1], np.linspace(0.5, 1, 50_000) ** gamma, rtol=2e-4
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_the_length_is_the_deviation_of_the_profile(length: float) -> None:
    updates = 20_000
    weights, times = profile(length, updates), (np.arange(updates) + 0.5) / updates
    mean = weights @ times
    assert (weights @ (times - mean) ** 2) ** 0.5 == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_exponent_is_the_one_that_has_this_length(length: float) -> None:
    """EDM2, equations 123 and 126; 16.97 and 6.94 are the paper's own."""
    gamma = power_exponent(length)
    deviation = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
    assert deviation == pytest.approx(length, rel=1e-12)
    square = length**-2
    assert gamma == pytest.approx(np.roots([1, 7, 16 - square, 12 - square]).real.max(), rel=1e-8)
    assert round(power_exponent(0.05), 2) == 16.97
    assert round(power_exponent(0.1), 2) == 6.94


@pytest.mark.parametrize("length", [-0.1, 0.0, LONGEST, 0.3, float("nan")])
def test_a_length_that_no_average_has_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match=r"length=.* must be above 0 and below 0\.2887"):
        power_exponent(length)


def test_an_average_that_was_kept_is_made_of_itself(tmp_path: Path) -> None:
    true = walk(tmp_path, every=40)
    synthesis = synthesize(find_snapshots(tmp_path), length=0.1)
    assert [(s.step, s.length) for s in synthesis.snapshots] == [(480, 0.1)]
    assert synthesis.error < 1e-7
    torch.testing.assert_close(only(synthesis), true["0.1"].to(DTYPE).float(), rtol=1e-6, atol=0)
    earlier = synthesize(find_snapshots(tmp_path), length=0.05, step=120)
    assert [(s.step, s.length) for s in earlier.snapshots] == [(120, 0.05)]


@pytest.mark.parametrize("length", ["0.07", "0.15", "0.2"])
def test_an_average_that_was_not_kept_comes_nearer_with_more_snapshots(
    tmp_path: Path, length: str
) -> None:
    errors, profiles = [], []
    for every in (40, 20, 10):
        folder = tmp_path / str(every)
        true = walk(folder, every=every, lengths=(length,))
        synthesis = synthesize(find_snapshots(folder), length=float(length))
        errors.append(distance(only(synthesis), true[length]))
        profiles.append(synthesis.error)
        nearest = min(distance(true[stored], true[length]) for stored in STORED)
        assert errors[-1] < nearest / 10
    assert sorted(profiles, reverse=True) == profiles
    assert all(later < max(before, ROUNDING) for before, later in pairwise(errors))
    assert errors[-1] < 1e-3


def test_weights_are_those_of_least_squares_between_profiles_on_a_grid(tmp_path: Path) -> None:
    """The closed form (EDM2, equation 151 and algorithm 3) against profiles as long vectors."""
    for step in (30, 60, 90):
        save_snapshot(tmp_path, step, {length: {"w": torch.ones(1)} for length in STORED})
    snapshots = find_snapshots(tmp_path)
    times = (np.arange(900_000) + 0.5) / 10_000

    def profile(length: float, step: int) -> np.ndarray:
        gamma = power_exponent(length)
        return np.where(times < step, (gamma + 1) / step * (times / step) ** gamma, 0)

    profiles = np.stack([profile(s.length, s.step) for s in snapshots], axis=1)
    wanted = profile(0.13, 90)
    # The sum of 1, on the grid: the last weight is what the others leave.
    free, *_ = np.linalg.lstsq(
        profiles[:, :-1] - profiles[:, -1:], wanted - profiles[:, -1], rcond=None
    )
    expected = np.append(free, 1 - free.sum())
    with pytest.warns(UserWarning, match="is missed by"):
        found = synthesize(snapshots, length=0.13)
    np.testing.assert_allclose(found.weights, expected, atol=1e-4)
    error = np.linalg.norm(profiles @ expected - wanted) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(error, rel=1e-3)


def test_weights_that_never_changed_are_their_own_average_of_any_length(tmp_path: Path) -> None:
    for step in range(1, 17):
        save_snapshot(tmp_path, step, {length: {"w": torch.full((3,), 0.5)} for length in STORED})
    for length in (0.04, 0.15):
        made = synthesize(find_snapshots(tmp_path), length=length)
        torch.testing.assert_close(only(made), torch.full((3,), 0.5), rtol=1e-6, atol=0)


def test_a_poor_synthesis_warns(tmp_path: Path) -> None:
    walk(tmp_path, every=120)
    with pytest.warns(UserWarning, match=r"length 0\.02 at step 480 is missed by \d+%"):
        synthesize(find_snapshots(tmp_path), length=0.02)
    with pytest.warns(UserWarning, match=r"length 0\.07 at step 150 is missed by \d+%"):
        synthesize(find_snapshots(tmp_path), length=0.07, step=150)


def test_what_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no snapshots"):
        synthesize(find_snapshots(tmp_path), length=0.1)
    walk(tmp_path, every=120)
    for step in (119, 481):
        with pytest.raises(ValueError, match=f"step={step} must be from 120 to 480"):
            synthesize(find_snapshots(tmp_path), length=0.1, step=step)
    with pytest.raises(ValueError, match=r"length=0\.5 of an average"):
        synthesize(find_snapshots(tmp_path), length=0.5)


def test_a_snapshot_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"0.05": {f"layer.{i}": torch.full((i + 1,), float(i)) for i in range(20)}}
    hashes = set()
    for _ in range(8):
        save_snapshot(tmp_path, 7, tensors)
        (path,) = tmp_path.iterdir()
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert load_safetensors(path).keys() == tensors["0.05"].keys()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-0000004-0.05.safetensors.123.tmp").write_bytes(b"half")
    save_snapshot(tmp_path, 5, {"0.05": {"w": torch.ones(1)}})
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005-0.05.safetensors"]


@pytest.mark.parametrize("number", [1e5, float("nan"), float("inf")])
def test_weights_that_a_snapshot_cannot_hold_are_refused(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match=r"step 5: w of the average of length 0\.05"):
        save_snapshot(tmp_path, 5, {"0.05": {"w": torch.tensor([1.0, number])}})
    assert not list(tmp_path.iterdir())


def test_snapshots_of_two_networks_make_no_average(tmp_path: Path) -> None:
    for step in range(1, 11):
        width = 3 if step == 8 else 1
        save_snapshot(tmp_path, step, {length: {"w": torch.ones(width)} for length in STORED})
    with pytest.raises(ValueError, match=r"step-0000008-0\.05\.safetensors does not fit"):
        only(synthesize(find_snapshots(tmp_path), length=0.07))


def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "step-0000005-0.05.safetensors"
    for metadata in ({}, {"average": "[]"}, {"average": '{"step": 5}'}, {"average": "x"}):
        save_file({"w": torch.ones(1)}, path, metadata=metadata)
        with pytest.raises(ValueError, match="is not a snapshot of an average"):
            find_snapshots(tmp_path)


def learner(lengths: tuple[float, ...]) -> Learner:
    torch.manual_seed(0)
    return make_learner(nn.Linear(3, 2), ema_lengths=lengths, learning_rate=0.1, warmup_steps=0)


def take(one: Learner, updates: range, loss: Callable[[Tensor], Tensor] = torch.square) -> None:
    for number in updates:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        one.update(loss(one.forward_model(x)).mean())


def test_a_resumed_average_goes_on_as_if_it_had_not_stopped() -> None:
    full, before, after = (learner((0.05, 0.1)) for _ in range(3))
    take(full, range(10))
    take(before, range(4))
    state = {name: tensor.clone() for name, tensor in before.tensors().items()}
    after.load_tensors(state, num_updates=4)
    take(after, range(4, 10))
    for length, tensors in full.snapshots().items():
        for name, tensor in tensors.items():
            assert torch.equal(after.snapshots()[length][name], tensor)


def test_the_learner_tracks_the_average_that_the_synthesis_takes_it_for() -> None:
    one, length = learner((0.1,)), 0.1
    past = []
    for number in range(12):
        take(one, range(number, number + 1))
        past.append(one.model.weight.detach().double().clone())
    expected = sum(w * weight for w, weight in zip(profile(length, 12), past, strict=True))
    (tensors,) = one.snapshots().values()
    torch.testing.assert_close(tensors["weight"].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_plain_average_does_not_depend_on_the_others() -> None:
    alone, beside = learner(()), learner((0.05, 0.1))
    for one in (alone, beside):
        take(one, range(5))
    for name, tensor in alone.ema.state_dict().items():
        assert torch.equal(beside.ema.state_dict()[name], tensor)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as train_unet leaves it: a model, and snapshots that its UNet came by."""
    folder = tmp_path_factory.mktemp("run")
    pipeline = tiny_pipeline(folder / "tokens")
    pipeline.save_pretrained(folder / "model")
    for step in range(1, 6):
        weights = {name: p.detach() + step / 10 for name, p in pipeline.unet.named_parameters()}
        kept = {"0.05": weights, "0.1": {name: p - 1 / 10 for name, p in weights.items()}}
        save_snapshot(folder / "ema" / "unet", 100 * step, kept)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_command_replaces_the_weights_of_one_network_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    assert main(["ema", str(run), "--length", "0.07", "--step", "400", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "of 10 snapshots" in printed
    assert printed.endswith(f"{out}\n")
    before, after = files(run / "model"), files(out)
    assert before.keys() == after.keys()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert [name for name in after if after[name] != before[name]] == [weights]
    synthesis = synthesize(find_snapshots(run / "ema" / "unet"), length=0.07, step=400)
    unet = Pipeline.from_pretrained(out).unet
    for name, tensor in synthesis.tensors([name for name, _ in unet.named_parameters()]):
        torch.testing.assert_close(unet.get_parameter(name).data, tensor, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_command_lists_what_there_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ema", str(run), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("unet: length 0.05, 5 snapshots from step 100 to 500, ")


def test_the_command_refuses_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = tmp_path / "vae"
    save_snapshot(vae / "ema" / "vae", 5, {"0.05": {"w": torch.ones(1)}})
    other = tmp_path / "other"
    save_snapshot(other / "ema" / "unet", 5, {"0.05": {"w": torch.ones(1)}})
    tiny_pipeline(other / "tokens").save_pretrained(other / "model")
    unfinished = tmp_path / "unfinished"
    save_snapshot(unfinished / "ema" / "unet", 5, {"0.05": {"w": torch.ones(1)}})
    asked = ("--length", "0.05", "--out", str(tmp_path / "new"))
    for arguments, sentence in (
        ((str(tmp_path), *asked), "has no snapshots in ema/; train with --ema_lengths"),
        ((str(run),), "--length and --out are needed"),
        ((str(run), "--length", "0.4", "--out", "x"), "length=0.4 of an average must be above 0"),
        ((str(run), "--length", "0.1", "--out", str(run)), "is there already"),
        ((str(run), *asked, "--step", "50"), "step=50 must be from 100 to 500"),
        ((str(vae), *asked), "a VAE is saved with the statistics of its latents"),
        ((str(unfinished), *asked), "a run writes its model at every checkpoint"),
        ((str(other), *asked), "does not fit"),
    ):
        assert main(["ema", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_both_copies_of_the_text_tower_get_the_weights_of_a_clip(tmp_path: Path) -> None:
    model = tmp_path / "model"
    pipeline = tiny_pipeline(tmp_path / "tokens")
    clip = new_clip(
        CLIPSize(16, 1, 2, 16, 1, 2, 8, 8), pipeline.text_encoder.tokenizer, image_size=16
    )
    weights = {name: p.detach().clone() for name, p in clip.named_parameters()}
    save_snapshot(tmp_path / "ema", 5, {"0.05": {name: p + 1 for name, p in weights.items()}})
    # As train_clip saves its two towers.
    tower = CLIPText(clip.config.text_config)
    tower.load_state_dict(
        {name: clip.state_dict()[f"text_model.{name}"] for name in tower.state_dict()}
    )
    TextEncoder(tower, pipeline.text_encoder.tokenizer).save_pretrained(model)
    clip.save_pretrained(model / "clip")
    made = synthesize(find_snapshots(tmp_path / "ema"), length=0.05)
    write_model(model, tmp_path / "made", FILES["clip"], made)
    both = CLIPModel.from_pretrained(tmp_path / "made" / "clip")
    text = TextEncoder.from_pretrained(tmp_path / "made").model.state_dict()
    for name, weight in weights.items():
        expected = (weight + 1).half().float()
        assert torch.equal(both.get_parameter(name), expected)
        if name.startswith("text_model."):
            assert torch.equal(text[name.removeprefix("text_model.")], expected)
