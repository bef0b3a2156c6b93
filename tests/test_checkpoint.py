"""Checkpoints: complete or absent, the newest few, safetensors and JSON only."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.runs import make_learner
from torch import Tensor, nn

from latentdiff.training.checkpoint import load_checkpoint, save_checkpoint
from latentdiff.training.checkpoint_files import checkpoints, origin, verify
from latentdiff.training.learner import Learner

MANIFEST = {"configuration": {"seed": 1}, "fingerprints": {"data": "abc"}}


class Interrupted(Learner):
    """A learner in whose saving the user presses Control-C."""

    def tensors(self) -> dict[str, Tensor]:
        raise KeyboardInterrupt


def learner(seed: int, *, width: int = 4, kind: type[Learner] = Learner) -> Learner:
    torch.manual_seed(seed)
    return make_learner(nn.Linear(3, width), kind=kind, warmup_steps=0)


def train(subject: Learner, steps: int) -> None:
    for _ in range(steps):
        subject.update(subject.forward_model(torch.randn(5, 3)).square().mean())


def state(subject: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in subject.tensors().items()}


def test_a_checkpoint_restores_every_learner_and_says_the_step(tmp_path: Path) -> None:
    old = {"unet": learner(0), "critic": learner(1)}
    train(old["unet"], 3)
    train(old["critic"], 2)
    save_checkpoint(tmp_path, 7, old, keep=2, manifest=MANIFEST)
    new = {"unet": learner(2), "critic": learner(3)}
    assert load_checkpoint(tmp_path, new, manifest=MANIFEST) == 7
    for name in old:
        torch.testing.assert_close(state(new[name]), state(old[name]), rtol=0, atol=0)
    assert (new["unet"].num_updates, new["critic"].num_updates) == (3, 2)
    names = sorted(path.name for path in (tmp_path / "step-7").iterdir())
    assert names == ["critic.safetensors", "manifest.json", "unet.safetensors"]


def test_without_a_checkpoint_training_starts_at_zero(tmp_path: Path) -> None:
    subject = learner(0)
    before = state(subject)
    assert load_checkpoint(tmp_path / "none", {"net": subject}, manifest=MANIFEST) == 0
    torch.testing.assert_close(state(subject), before, rtol=0, atol=0)


def test_the_newest_few_are_kept_in_the_order_of_numbers(tmp_path: Path) -> None:
    subject = {"net": learner(0)}
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, subject, keep=3, manifest=MANIFEST)
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-10",
        "step-11",
        "step-9",
    ]
    assert load_checkpoint(tmp_path, subject, manifest=MANIFEST) == 11


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    subject = learner(0)
    save_checkpoint(tmp_path, 5, {"net": subject}, keep=2, manifest=MANIFEST)
    train(subject, 1)
    save_checkpoint(tmp_path, 5, {"net": subject}, keep=2, manifest=MANIFEST)
    other = learner(1)
    load_checkpoint(tmp_path, {"net": other}, manifest=MANIFEST)
    torch.testing.assert_close(state(other), state(subject), rtol=0, atol=0)


def test_an_interrupted_checkpoint_is_absent_and_in_nobodys_way(tmp_path: Path) -> None:
    whole = learner(0)
    save_checkpoint(tmp_path, 1, {"a": whole, "b": whole}, keep=2, manifest=MANIFEST)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(
            tmp_path, 2, {"a": whole, "b": learner(1, kind=Interrupted)}, keep=2, manifest=MANIFEST
        )
    assert (tmp_path / ".step-2.tmp").is_dir()
    assert load_checkpoint(tmp_path, {"a": learner(2), "b": learner(3)}, manifest=MANIFEST) == 1
    save_checkpoint(tmp_path, 2, {"a": whole, "b": whole}, keep=2, manifest=MANIFEST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-2"]


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-3.bak", "step-", "step-x", "old-step-4", ".step-9.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == []


def test_checkpoints_of_another_network_are_refused_with_advice(tmp_path: Path) -> None:
    """Changing --unet.… and running the same command again ended in a traceback."""
    save_checkpoint(tmp_path, 4, {"net": learner(0)}, keep=1, manifest=MANIFEST)
    with pytest.raises(
        ValueError, match=r"step-4 was made with .*model.weight is \(4, 3\).*output_dir"
    ):
        load_checkpoint(tmp_path, {"net": learner(0, width=5)}, manifest=MANIFEST)


def test_checkpoints_open_whatever_their_first_byte(tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header; one in 32 passed for a pickle."""
    seen = set()
    for length in range(0, 128, 4):
        network = nn.Module()
        network.register_parameter("w" * (1 + length), nn.Parameter(torch.ones(2)))
        subject = make_learner(network)
        save_checkpoint(tmp_path, 1, {"net": subject}, keep=1, manifest=MANIFEST)
        seen.add((tmp_path / "step-1" / "net.safetensors").read_bytes()[0])
        assert load_checkpoint(tmp_path, {"net": subject}, manifest=MANIFEST) == 1
    assert 0x80 in seen


FILES = ("net.safetensors", "manifest.json")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damage_is_named_and_the_next_older_checkpoint_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    subject = learner(0)
    save_checkpoint(tmp_path, 4, {"net": subject}, keep=2, manifest=MANIFEST)
    expected = state(subject)
    train(subject, 1)
    save_checkpoint(tmp_path, 8, {"net": subject}, keep=2, manifest=MANIFEST)
    damage(tmp_path / "step-8" / name)
    with pytest.raises(ValueError, match=f"step-8/{name}"):  # asked for, so not replaced
        load_checkpoint(tmp_path, {"net": learner(1)}, manifest=MANIFEST, path=tmp_path / "step-8")
    other = learner(1)
    with pytest.warns(UserWarning, match=f"step-8/{name}.*going on from step-4"):
        assert load_checkpoint(tmp_path, {"net": other}, manifest=MANIFEST) == 4
    torch.testing.assert_close(state(other), expected, rtol=0, atol=0)
    damage(tmp_path / "step-4" / name)
    with pytest.raises(ValueError, match=f"no checkpoint in .* is intact: .*{name}"):
        load_checkpoint(tmp_path, {"net": other}, manifest=MANIFEST)


def test_damaged_checkpoints_neither_count_as_kept_nor_stay_in_the_way(tmp_path: Path) -> None:
    """A run goes back before a damaged one, and must not prune the good for it."""
    subject = {"net": learner(0)}
    for step in (4, 8):
        save_checkpoint(tmp_path, step, subject, keep=2, manifest=MANIFEST)
    cut(tmp_path / "step-8" / "manifest.json")
    save_checkpoint(tmp_path, 6, subject, keep=1, manifest=MANIFEST)
    with pytest.warns(UserWarning, match="going on from step-6"):
        assert load_checkpoint(tmp_path, subject, manifest=MANIFEST) == 6
    save_checkpoint(tmp_path, 8, subject, keep=1, manifest=MANIFEST)
    assert [step for step, _ in checkpoints(tmp_path)] == [8]
    assert load_checkpoint(tmp_path, subject, manifest=MANIFEST) == 8


def test_the_manifest_says_what_made_the_checkpoint_and_what_is_in_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, {"net": learner(0)}, keep=1, manifest=MANIFEST)
    manifest = verify(tmp_path / "step-4")
    assert manifest["configuration"] == {"seed": 1}
    assert manifest["step"] == 4
    assert manifest["versions"]["torch"] == torch.__version__
    weights = tmp_path / "step-4" / "net.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    entry = {"size": weights.stat().st_size, "sha256": digest}
    assert manifest["files"] == {"net.safetensors": entry}
    assert (tmp_path / "latest").read_text() == "step-4\n"


def test_checkpoints_of_other_data_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, {"net": learner(0)}, keep=1, manifest=MANIFEST)
    other = {**MANIFEST, "fingerprints": {"data": "xyz"}}
    with pytest.raises(ValueError, match=r"step-4 was made with another data than this run's"):
        load_checkpoint(tmp_path, {"net": learner(0)}, manifest=other)


def test_a_run_taken_back_goes_on_from_its_own_checkpoints(tmp_path: Path) -> None:
    """The same command again must not lose what came of it, nor mix it with what was left."""
    subject = {"net": learner(0)}
    for step in (3, 6, 9):
        train(subject["net"], 3)
        save_checkpoint(tmp_path, step, subject, keep=9, manifest=MANIFEST)
    old = state(subject["net"])
    back = tmp_path / "step-3"
    manifest = {**MANIFEST, "resumed_from": origin(tmp_path, back)}
    taken = {"net": learner(1)}
    assert load_checkpoint(tmp_path, taken, manifest=manifest, path=back) == 3
    assert [step for step, _ in checkpoints(tmp_path)] == [3]
    assert verify(tmp_path / "abandoned-step-9")["step"] == 9  # nothing is lost
    train(taken["net"], 1)
    save_checkpoint(tmp_path, 5, taken, keep=1, manifest=manifest)  # which prunes step-3
    again = {"net": learner(2)}
    assert load_checkpoint(tmp_path, again, manifest=manifest, path=back) == 5
    torch.testing.assert_close(state(again["net"]), state(taken["net"]), rtol=0, atol=0)
    assert load_checkpoint(tmp_path, again, manifest=MANIFEST) == 5
    abandoned = tmp_path / "abandoned-step-9"
    assert load_checkpoint(tmp_path, again, manifest=manifest, path=abandoned) == 9
    torch.testing.assert_close(state(again["net"]), old, rtol=0, atol=0)
