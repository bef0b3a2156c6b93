"""The loop: an interrupted run goes on bit for bit, and its log knows no interruption."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import mostly_exhaustive
from support.runs import options
from support.scripts import without_curves
from support.small_run import small_run
from torch import Tensor
from torch.utils.data import TensorDataset

from latentdiff.data.batches import batches
from latentdiff.diffusion import Diffusion
from latentdiff.formats.weights import load_safetensors
from latentdiff.models.clip import CLIPSize, new_clip
from latentdiff.models.precision import computes_bf16
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.tasks.clip.tokenizer import train_tokenizer
from latentdiff.tasks.denoiser.loss import LossConfig
from latentdiff.tasks.vae.losses import vae_loss
from latentdiff.training.learner import Learner
from latentdiff.training.logging.log import Log
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.loop import fit
from latentdiff.training.randomness import MicroBatch, generator
from latentdiff.training.run import Run

SEED = 1
OPTIONS: dict[str, Any] = {
    **{"learning_rate": 1e-2, "warmup_steps": 3, "cooldown_steps": 3, "ema_decay": 0.9},
    **{"max_steps": 8, "batch_size": 4, "log_every": 3, "preview_every": 4},
    **{"checkpoint_every": 4, "seed": SEED, "mixed_precision": "no"},
}
TIMED = ("samples_per_second", "data_wait", "memory")
Step = Callable[[Any, int, MicroBatch], Metrics]


def unet(run: Run) -> tuple[Learner, Step]:
    torch.manual_seed(0)
    blocks = UNetConfig(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
        in_channels=3,
        out_channels=3,
    )
    learner = run.learner(UNet(blocks))
    diffusion = Diffusion("flow", "flow_prediction")

    def step(batch: list[Tensor], number: int, micro_batch: MicroBatch) -> Metrics:
        draw = generator(SEED, number, "noise")
        noise = torch.randn(batch[0].shape, generator=draw)
        t = LossConfig().sample_t(diffusion, len(noise), generator=draw)
        context = torch.randn(len(noise), 5, 6, generator=draw)
        loss = diffusion.loss(learner.forward_model, batch[0], context, noise=noise, t=t).mean()
        return {"loss": loss, "grad_norm": learner.update(loss, micro_batch)}

    return learner, step


def vae(run: Run) -> tuple[Learner, Step]:
    torch.manual_seed(0)
    blocks = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
    learner = run.learner(VAE(blocks))

    def step(batch: list[Tensor], number: int, micro_batch: MicroBatch) -> Metrics:
        noise = torch.randn(len(batch[0]), 4, 4, 4, generator=generator(SEED, number, "z"))
        reconstruction, posterior = learner.forward_model(batch[0], noise)
        loss, _, kl = vae_loss(reconstruction, batch[0], posterior, norm="l1", kl_weight=0.1)
        return {"loss": loss, "kl": kl, "grad_norm": learner.update(loss, micro_batch)}

    return learner, step


def clip(run: Run) -> tuple[Learner, Step]:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a cat", "a dog"], vocab_size=520, length=6)
    size = CLIPSize(
        text_width=8,
        text_layers=1,
        text_heads=2,
        image_width=8,
        image_layers=1,
        image_heads=2,
        patch_size=4,
        projection_dim=6,
    )
    learner = run.learner(new_clip(size, tokenizer, image_size=8))
    words = ["a cat", "a dog", "cats", "dogs"]
    ids = tokenizer(words, padding="max_length", return_tensors="pt").input_ids

    def step(batch: list[Tensor], number: int, micro_batch: MicroBatch) -> Metrics:
        output = learner.forward_model(input_ids=ids, pixel_values=batch[0], return_loss=True)
        return {"loss": output.loss, "grad_norm": learner.update(output.loss, micro_batch)}

    return learner, step


class LoopTask:
    """A learner with its step; Control-C comes in step number `until`; `saved` is in order."""

    fingerprints: dict[str, str] = {}  # noqa: RUF012 - nobody changes it
    data_summary = None

    def __init__(self, made: tuple[Learner, Step], folder: Path, until: int | None) -> None:
        self.learner, self._step = made
        self.learners = {"net": self.learner}
        self.folder, self.until, self.saved = folder, until, list[str]()

    def step(self, batch: list[Tensor], step: int, micro_batch: MicroBatch) -> Metrics:
        if step == self.until:
            raise KeyboardInterrupt
        return self._step(batch, step, micro_batch)

    def validate(self) -> Metrics:
        return {}

    def save(self, folder: Path) -> None:
        steps = self.learner.num_updates
        assert not (self.folder / "checkpoints" / f"step-{steps}").exists()
        self.saved.append(f"{folder.name} {steps}")

    def preview(self, path: Path) -> None:
        path.touch()
        self.saved.append(path.name)


def run(
    folder: Path,
    make: Callable[[Run], tuple[Learner, Step]] = unet,
    *,
    until: int | None = None,
    curves: bool = False,
    **changes: int,
) -> list[str]:
    """Train into `folder`; Control-C comes in step number `until`. What was saved, in order."""
    config = options(**{**OPTIONS, "output_dir": folder, **changes})
    run = Run(config, f"max_steps: {config.loop.max_steps}\n")
    images = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def loader(start: int) -> Iterator[list[Tensor]]:
        return batches(
            TensorDataset(images),
            start,
            num_samples=len(images),
            batch_size=config.loop.batch_size,
            seed=config.loop.seed,
            stop=config.loop.max_steps,
        )

    task = LoopTask(make(run), folder, until)
    with nullcontext() if curves else without_curves():
        fit(task, loader, run)
    return task.saved


def log(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def untimed(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k not in TIMED} for r in records]


def newest(folder: Path) -> dict[str, Tensor]:
    return load_safetensors(folder / "checkpoints" / "step-8" / "net.safetensors")


@pytest.mark.parametrize("make", mostly_exhaustive([unet, vae, clip]))
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, make: Any) -> None:
    """Weights, average, moments and log; step 6 is neither at a checkpoint nor at a log."""
    run(tmp_path / "straight", make)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", make, until=6)
    assert [record["step"] for record in log(tmp_path / "resumed")] == [3, 4, 6]
    run(tmp_path / "resumed", make)
    expected, found = newest(tmp_path / "straight"), newest(tmp_path / "resumed")
    assert {name.partition(".")[0] for name in expected} == {"model", "ema", "optimizer"}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    records = log(tmp_path / "straight")
    assert [record["step"] for record in records] == [3, 4, 6, 8]
    assert untimed(log(tmp_path / "resumed")) == untimed(records)


def test_control_c_saves_and_what_is_kept_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It saved nothing, and before the first checkpoint said that the run goes on from one."""
    run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt, match="nothing was saved, and the same command begins"):
        run(tmp_path / "resumed", until=1)

    def press(task: LoopTask, batch: list[Tensor], step: int, micro_batch: MicroBatch) -> Metrics:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return task._step(batch, step, micro_batch)

    # Tests may run in the background, which ignores Control-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(LoopTask, "step", press)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "resumed")
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    said = capfd.readouterr()
    assert "stopped by Control-C after step 6; the same command goes on there" in said.out
    assert "Control-C once more stops at once" in said.err
    with pytest.raises(KeyboardInterrupt, match="goes on from step 6, which is saved"):
        run(tmp_path / "resumed", until=6)
    run(tmp_path / "resumed")
    expected, found = newest(tmp_path / "straight"), newest(tmp_path / "resumed")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_run_goes_on_to_more_steps(tmp_path: Path) -> None:
    """As if it had been that long from the start, without a cool-down to be repeated."""
    run(tmp_path / "straight", cooldown_steps=0)
    run(tmp_path / "longer", cooldown_steps=0, max_steps=4)
    run(tmp_path / "longer", cooldown_steps=0)
    expected, found = newest(tmp_path / "straight"), newest(tmp_path / "longer")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert untimed(log(tmp_path / "longer")) == untimed(log(tmp_path / "straight"))


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    assert run(tmp_path) == ["step-0000004.png", "model 4", "step-0000008.png", "model 8"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (tmp_path / "config.yaml").read_text() == "max_steps: 8\n"
    assert run(tmp_path) == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_is_ended_where_a_signal_stopped_it_has_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal leaves time for a checkpoint alone; with `max_steps` at its step, the model of an
    earlier one, or none, was called the run's.
    """

    def stop(learner: Learner) -> Metrics:
        if learner.num_updates == 4:  # which is seen after the next step
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(SystemExit) as caught:
        small_run(tmp_path, validate=stop, validate_every=4)
    assert caught.value.code == 143
    shutil.rmtree(tmp_path / "model")
    small_run(tmp_path, max_steps=5)
    assert (tmp_path / "model").is_dir()
    assert "is behind" not in capsys.readouterr().out
    small_run(tmp_path, max_steps=2)
    assert "max_steps=2 is behind: the model is step 5's" in capsys.readouterr().out


def test_the_last_step_is_logged_shown_and_kept_at_any_interval(tmp_path: Path) -> None:
    intervals = {"log_every": 100, "preview_every": 100, "checkpoint_every": 100}
    assert run(tmp_path, max_steps=5, curves=True, **intervals) == ["step-0000005.png", "model 5"]
    assert [record["step"] for record in log(tmp_path)] == [5]
    assert (tmp_path / "checkpoints" / "step-5" / "net.safetensors").is_file()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_logs_are_means_over_their_steps(tmp_path: Path) -> None:
    run(tmp_path / "every", max_steps=4, log_every=1, checkpoint_every=4)
    run(tmp_path / "sparse", max_steps=4, log_every=4, checkpoint_every=4)
    singles, (mean,) = log(tmp_path / "every"), log(tmp_path / "sparse")
    for name in ("loss", "grad_norm"):
        assert mean[name] == pytest.approx(sum(single[name] for single in singles) / 4)
    optimizer = options(**OPTIONS).optimizer
    rates = [optimizer.learning_rate_at(step, max_steps=4) for step in range(4)]
    assert [single["learning_rate"] for single in singles] == rates
    assert mean["learning_rate"] == rates[-1]
    assert all(record["samples_per_second"] > 0 for record in [mean, *singles])


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    Log(path, 0)
    assert path.read_bytes() == b""
    lines = [f'{{"step": {step}, "loss": 0.5}}\n' for step in (2, 4, 6)]
    for rest in ("", '{"step": 8, "lo', '{"step": 8}', "\0" * 20, "\0" * 20 + "\n"):
        for start, kept in ((0, 0), (3, 1), (4, 2), (7, 3), (100, 3)):
            path.write_text("".join(lines) + rest, encoding="utf-8")
            resumed = Log(path, start)
            assert path.read_text(encoding="utf-8") == "".join(lines[:kept])
            resumed.write({"step": 9, "loss": 1.0})
            assert log(path.parent)[-1] == {"step": 9, "loss": 1.0}


@pytest.mark.parametrize(
    "name",
    [
        "max_steps",
        "batch_size",
        "log_every",
        "preview_every",
        "checkpoint_every",
        "keep_checkpoints",
        "gradient_accumulation_steps",
        "max_nonfinite_steps",
        "timeout",
        "validate_every",
        "snapshot_every",
    ],
)
def test_counts_of_nothing_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        options(**{name: 0})


def test_a_batch_that_micro_batches_cannot_make_up_is_refused(tmp_path: Path) -> None:
    config = options(output_dir=tmp_path, batch_size=6, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="batch_size=6 must be divisible by 4: 1 processes with"):
        Run(config, "")


def test_logs_say_where_time_and_memory_went(tmp_path: Path) -> None:
    run(tmp_path)
    for record in log(tmp_path):
        assert 0 <= record["data_wait"] < 1
        assert 1e7 < record["memory"] < 1e11
        assert record["skipped"] == 0


def test_the_progress_bar_says_how_training_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    last = log(tmp_path)[-1]
    bar = capsys.readouterr().err
    assert f"loss={last['loss']:.4f}, grad_norm={last['grad_norm']:.2g}, " in bar
    assert f"{last['samples_per_second']:.1f} images/s" in bar
    assert f"{last['memory'] / 2**30:.1f} GiB" in bar


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        options(seed=-1)


def test_bfloat16_is_for_devices_that_compute_in_it() -> None:
    assert computes_bf16(torch.device("cpu")) == torch.cpu._is_avx512_bf16_supported()
    assert not computes_bf16(torch.device("mps"))
