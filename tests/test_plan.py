"""Planning: counted arithmetic against formulas, counted memory against that of real tensors."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.cases import mostly_exhaustive
from support.runs import make_learner
from support.settings import ANY, clip, dit, unet, vae
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from latentdiff.cli import main
from latentdiff.cli import plan as command
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.shapes import build_shapes
from latentdiff.models.layers import Attention
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.planning.devices import DEVICES
from latentdiff.planning.footprint import Execution, Workload, footprint, nbytes
from latentdiff.planning.plan import make_plan
from latentdiff.planning.settings import num_cached, read_settings
from latentdiff.planning.workload import cache_bytes_per_image, make_workload

ROOT = Path(__file__).parents[1]


class Small(nn.Module):
    """A convolution, attention of its pixels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.attention = Attention(16, heads=2)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(self.conv(x).flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("side", [8, 16])  # products for few tokens, the fused kernel for many
def test_arithmetic_is_that_of_the_formulas(side: int) -> None:
    n, N, C = 2, side * side, 16
    workload = Workload(Small, lambda model, _, n: model(torch.randn(n, 3, side, side)).mean())
    counted = footprint(workload, n)
    conv, linear, attention = 2 * 9 * 3 * C * N, 2 * C * 5 * N, 4 * N * N * C
    projections = 4 * 2 * C * C * N
    assert counted.forward_flop == n * (conv + linear + projections + attention)
    # Backward, a product for the weight and one for the input, which the first layer's has not;
    # fused attention computes its scores a second time, one more product of five.
    again = 2 * attention + (0 if side == 8 else attention // 2)
    backward = conv + 2 * (linear + projections) + again
    assert counted.step_flop == counted.forward_flop + n * backward


@pytest.mark.parametrize(
    "settings",
    mostly_exhaustive([unet(32, 2, 32), dit(2), dit(2, "joint"), vae(16, 2, 16), clip(3)]),
)
def test_arithmetic_is_what_torch_counts_on_real_tensors(settings: dict[str, Any]) -> None:
    workload = make_workload(settings)
    batch = settings["batch_size"]
    model, frozen = workload.model(), workload.frozen()
    # The CPU's fused attention, which the text encoder calls, torch's counter has to be told of.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {fused: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        workload.loss(model, frozen, batch).backward()
    assert footprint(workload, batch).step_flop == counter.get_total_flops()


@pytest.mark.full_size
def test_the_parameters_of_sd_15_are_859_520_964() -> None:
    """The number of the published weights, and 803 GFLOP a forward pass of 64×64 latents."""
    plan = make_plan(sd15(), device=DEVICES["a100-80gb"], gpu=True, processes=8)
    assert plan.footprint.num_parameters == 859_520_964
    assert plan.forward_flop == pytest.approx(803.3e9, rel=1e-3)
    assert plan.cache_bytes_per_image == 2 * 8 * 64 * 64
    assert plan.resident["gradient buckets"] == 4 * 859_520_964


def sd15() -> dict[str, Any]:
    """The configuration of docs/scaling.md."""
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])


@pytest.mark.exhaustive
def test_the_memory_of_a_network_is_that_of_its_tensors() -> None:
    plan = make_plan(unet(32, 2, 32), device=ANY, gpu=False)
    network = make_workload(unet(32, 2, 32)).model()
    assert isinstance(network, UNet)
    assert plan.footprint.weights == nbytes(network)
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert plan.resident["optimizer state"] == sum(moment.nbytes for moment in moments)
    assert plan.checkpoint_bytes == 2 * nbytes(network) + plan.resident["optimizer state"]


@pytest.mark.exhaustive
def test_with_muon_the_matrices_have_one_moment() -> None:
    adamw, muon = (
        make_plan({**unet(32, 2, 32), "optimizer": name}, device=ANY, gpu=False)
        for name in ("adamw", "muon")
    )
    network = make_workload(unet(32, 2, 32)).model()
    learner = make_learner(network, optimizer="muon")
    loss = torch.stack([p.square().sum() for p in network.parameters()]).sum()
    learner.update(loss)
    moments = [
        tensor
        for name, tensor in learner.tensors().items()
        if name.startswith("optimizer.") and not name.endswith(".step")
    ]
    assert muon.resident["optimizer state"] == sum(moment.nbytes for moment in moments)
    matrices = adamw.footprint.optimizer_state - muon.footprint.optimizer_state
    assert matrices > 0.5 * muon.footprint.weights
    for key in ("peak", "checkpoint_bytes"):
        assert getattr(adamw, key) - getattr(muon, key) == matrices


def test_activations_are_what_autograd_saves() -> None:
    """Against torch's own hooks, on real tensors; the rest is the loss, and the batch itself."""
    workload = make_workload(vae(16, 4, 32))
    model = workload.model()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = workload.loss(model, [], 4)
    assert loss.requires_grad
    assert footprint(workload, 4).activations == pytest.approx(sum(saved.values()), rel=0.03)


@pytest.mark.exhaustive
def test_half_precision_and_smaller_micro_batches_need_less() -> None:
    workload = make_workload(vae(16, 8, 32))

    def step(precision: str, *, accumulation: int = 1, gpu: bool = False) -> int:
        execution = Execution(precision=precision, gpu=gpu)
        return footprint(
            workload, 8 // accumulation, accumulation=accumulation, execution=execution
        ).step_peak

    assert step("bf16") < 0.8 * step("no")
    assert step("bf16") < step("bf16", gpu=True) < step("no", gpu=True)
    assert step("no", accumulation=4) < 0.5 * step("no")


@pytest.mark.parametrize(
    ("precision", "gpu"), mostly_exhaustive([("no", False), ("bf16", False), ("bf16", True)])
)
def test_gradient_checkpointing_saves_less_and_runs_the_blocks_again(
    precision: str, gpu: bool
) -> None:
    """In the VAE they are about half of the forward pass; the rest is convolutions alone."""
    plain, again = (
        footprint(
            make_workload(vae(16, 4, 32)),
            4,
            execution=Execution(precision=precision, gpu=gpu, gradient_checkpointing=on),
        )
        for on in (False, True)
    )
    assert again.forward_flop == plain.forward_flop
    more = (again.step_flop - plain.step_flop) / plain.forward_flop
    assert 0.4 < more < 1
    assert again.activations < 0.6 * plain.activations
    assert again.step_peak < 0.8 * plain.step_peak


@pytest.mark.exhaustive
def test_a_sharded_network_is_divided_by_the_processes() -> None:
    workload = make_workload(unet(32, 4, 32))
    one = footprint(workload, 4)
    two, eight = (
        footprint(workload, 4, execution=Execution(processes=n, sharding="full")) for n in (2, 8)
    )
    assert one.resident(averages=1)["weight averages"] == one.weights
    for sharded, count in ((two, 2), (eight, 8)):
        assert sharded.num_parameters == one.num_parameters
        assert sharded.step_flop == one.step_flop
        # Rows that do not divide evenly, such as the three of an output, round up.
        assert sharded.local_weights == pytest.approx(one.weights / count, rel=0.02)
        resident = sharded.resident(averages=3)
        assert resident["optimizer state"] == 2 * sharded.local_weights
        muon = replace(sharded.execution, optimizer="muon")
        orthogonalised = footprint(workload, 4, execution=muon)
        matrices = 2 * sharded.local_weights - orthogonalised.local_optimizer_state
        whole = one.optimizer_state - orthogonalised.optimizer_state
        assert matrices == whole // count > 0
        state = orthogonalised.resident(averages=3)["optimizer state"]
        assert state == resident["optimizer state"] - matrices
        assert resident["weight averages"] == sharded.weights + 3 * sharded.local_weights
    assert eight.step_peak < two.step_peak


@pytest.mark.exhaustive
def test_zero_partitions_the_moments_and_in_stage_2_the_gradients() -> None:
    workload = make_workload(vae(16, 1, 8))
    full, first, second = (
        footprint(workload, 1, execution=Execution(processes=4, sharding=sharding))
        for sharding in ("none", "zero1", "zero2")
    )
    moments = full.resident(averages=1)["optimizer state"]
    for partitioned in (first, second):
        assert partitioned.resident(averages=1)["optimizer state"] == moments // 4
    assert first.step_peak == full.step_peak
    assert second.step_peak < full.step_peak


@pytest.mark.exhaustive
def test_each_average_is_one_more_in_memory_and_on_disk() -> None:
    settings = {**vae(16, 2, 32), "ema_lengths": [0.05, 0.1]}
    one, three = (make_plan(s, device=ANY, gpu=True) for s in (vae(16, 2, 32), settings))
    assert three.resident["weight averages"] == 3 * one.resident["weight averages"]
    weights = 4 * one.footprint.num_parameters
    assert three.checkpoint_bytes - one.checkpoint_bytes == 2 * weights
    assert one.snapshot_bytes == 0
    assert three.snapshot_bytes == weights  # two of them in half precision


def test_each_view_of_an_image_is_cached() -> None:
    settings = {**unet(32, 2, 32), "crops": 3, "flip": True}
    one, six = (cache_bytes_per_image(s) for s in (unet(32, 2, 32), settings))
    assert one is not None
    assert six == 6 * one


def test_a_masked_image_is_cached_beside_the_image_with_its_mask() -> None:
    """Of 16 latent channels: 32 numbers a pixel of the latents, and 65 with each mask."""
    settings = {**unet(32, 2, 32), "crops": 2}
    plain, masked = (cache_bytes_per_image(s) for s in (settings, {**settings, "masks": 3}))
    assert plain is not None
    assert masked is not None
    assert masked * 32 == plain * 3 * 65


@pytest.mark.exhaustive
def test_accumulation_changes_no_arithmetic() -> None:
    plans = [{**vae(16, 8, 32), "gradient_accumulation_steps": steps} for steps in (1, 4)]
    one, four = (make_plan(settings, device=ANY, gpu=False) for settings in plans)
    assert one.training_flop == four.training_flop
    assert one.forward_flop == four.forward_flop


@pytest.mark.exhaustive
def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    def peak(batch: int) -> float:
        return make_plan(vae(16, batch, 32), device=ANY, gpu=False).peak

    limit = 60e6
    plan = make_plan(vae(16, 1, 32), device=ANY, gpu=False, memory=limit)
    assert plan.max_micro_batch_size is not None
    assert plan.max_micro_batch_size > 1
    assert peak(plan.max_micro_batch_size) <= limit < peak(plan.max_micro_batch_size + 1)
    assert make_plan(vae(16, 1, 32), device=ANY, gpu=False, memory=1e6).max_micro_batch_size == 0


@pytest.mark.exhaustive
def test_twice_the_processes_take_half_the_time() -> None:
    one, two = (make_plan(clip(4), device=ANY, gpu=True, processes=n) for n in (1, 2))
    assert two.images_per_second == pytest.approx(2 * one.images_per_second, rel=0.01)


def test_the_command_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(clip(8)))
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    given = ["plan", "--config", str(path), "--device", "l4", "--batch_size", "4"]
    arguments = parser.parse_args([*given, "--processes", "2", "--max_steps", "1000"])
    arguments.run(arguments)
    printed = capsys.readouterr().out
    assert "clip: batch_size 4 on 2 × l4, micro-batches of 2" in printed
    assert "time of 1,000 steps" in printed
    assert "fits" in printed
    arguments.device = "a toaster"
    with pytest.raises(ValueError, match="device='a toaster' must be one of cpu, t4"):
        arguments.run(arguments)


@pytest.mark.parametrize(
    ("former", "name"),
    [("pictures", "images"), ("accumulation", "gradient_accumulation_steps")],
)
def test_a_former_option_is_refused_with_its_new_name(
    former: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--config", "config.yaml", f"--{former}", "4"])
    assert f"argument --{former}: it is named --{name} now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_size": 31}, "image_size=31 must be divisible by 2"),
        ({"image_size": None}, "image_size is missing"),
        ({"batch_size": 3}, "batch_size=3 must be divisible by 2"),
        ({"batch_size": "many"}, "batch_size='many' must be a whole number"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'"),
        ({"sharding": "half"}, "sharding='half' must be one of none, full, zero1, zero2"),
        ({"optimizer": "sgd"}, "optimizer='sgd' must be one of adamw, adamw8bit, muon"),
        ({"optimizer": "muon", "sharding": "zero2"}, "optimizer='muon' must be 'adamw' with"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing='yes' must be one of True"),
        ({"vae": {"layers_per_block": 1}}, "vae.block_out_channels is missing"),
        ({"vae": {**vae(16, 1, 8)["vae"], "width": 3}}, "vae.width is unknown"),
        ({"vae": "emoji"}, "one of unet, dit, vae and clip"),
        ({"vae": "emoji", "batch_size": None}, "one of unet, dit, vae and clip"),  # a cache's
        ({"disc_weight": 0.5}, "disc_weight=0.5 must be 0 for a plan"),
        ({"perceptual_weight": 1.0}, "perceptual_weight=1.0 must be 0 for a plan"),
        ({"init": "emoji"}, "init='emoji' must be left out for a plan"),
        ({"decoder_only": True}, "decoder_only=True must be False for a plan"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(change: dict[str, Any], sentence: str) -> None:
    settings = {**vae(16, 2, 32), **change}
    with pytest.raises(ValueError, match=sentence):
        make_plan(settings, device=ANY, gpu=False, processes=2)


def test_a_cache_says_its_size_crops_and_flips(tmp_path: Path) -> None:
    """A run's config.yaml names the cache alone: options of encoding have no effect beside it."""
    torch.manual_seed(0)
    network = VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3))
    build_shapes(tmp_path / "data", count=4, seed=0, size=32)
    images = CaptionedImages(DataConfig(data=str(tmp_path / "data"), image_size=32))
    write_cache(tmp_path / "cache", images, network, batch_size=4, crop_flip=CropFlip(2, True))
    path = tmp_path / "config.yaml"
    path.write_text(f"cache: {tmp_path / 'cache'}\nbatch_size: 4")
    expected = {"batch_size": 4, "image_size": 32, "crops": 2, "flip": True}
    settings = read_settings(path, {})
    assert {key: settings[key] for key in expected} == expected
    assert num_cached(settings) == 4
    assert num_cached({"cache": "of a project that is not trained"}) is None


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, sentence in (
        ("- 1", "must be a YAML mapping"),
        ("a: [", "is not YAML"),
        ("a: 1\nb: 2\na: 3", r"config\.yaml: the key 'a' is there twice, in lines 1 and 3; keep"),
        ("accumulation: 2", "accumulation is named gradient_accumulation_steps now"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            read_settings(path, {})
