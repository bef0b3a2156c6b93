"""The plan of a training from `init`: shapes that are read, what is frozen, what makes it fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ldm import checkpoint
from support.runs import make_learner
from support.settings import ANY, unet, vae
from support.tiny import tiny_pipeline

from latentdiff.cli import main
from latentdiff.formats.weights import save_safetensors
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig
from latentdiff.pipeline import Pipeline
from latentdiff.planning.plan import Plan, _largest, find_fitting_options, make_plan
from latentdiff.planning.settings import read_settings, with_options
from latentdiff.planning.start import read_start
from latentdiff.planning.workload import make_workload
from latentdiff.training.adamw8bit import moment_bytes

GPU: dict[str, Any] = {"device": ANY, "gpu": True}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return tiny_pipeline(tmp_path / "scratch")


@pytest.fixture
def folder(pipeline: Pipeline, tmp_path: Path) -> Path:
    """A model of which nothing but configurations can be read."""
    pipeline.save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.write_bytes(b"")
    return tmp_path / "model"


def settings(init: Path | str, **changes: Any) -> dict[str, Any]:
    shared = {"batch_size": 2, "image_size": 16, "mixed_precision": "no"}
    return {"init": str(init), **shared, **changes}


def lora(**options: Any) -> dict[str, Any]:
    return {"lora": {"rank": 4, **options}}


def test_only_configurations_of_a_folder_are_read(folder: Path, pipeline: Pipeline) -> None:
    start = read_start(folder)
    assert (start.network, start.vae) == (pipeline.unet.config, pipeline.vae.config)
    assert start.text.hidden_size == pipeline.text_encoder.width
    assert read_start("sd15").network == UNetConfig()


def test_of_a_single_file_the_header_alone(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    pipeline.save_single_file(path)
    monkeypatch.setattr("latentdiff.formats.single_file.load_safetensors", None)
    start = read_start(path)
    assert (start.network, start.vae) == (pipeline.unet.config, pipeline.vae.config)


@pytest.mark.interchange
@pytest.mark.parametrize("open_clip", [False, True])
def test_so_are_those_of_an_original_checkpoint(tmp_path: Path, open_clip: bool) -> None:
    """With `open_clip` nothing but weights says what it predicts, which changes no size."""
    network = UNetConfig(
        block_out_channels=(64, 64, 128, 128),
        cross_attention_dim=64,
        attention_head_dim=(1, 1, 2, 2) if open_clip else 8,
        use_linear_projection=open_clip,
    )
    tensors = checkpoint(
        network,
        VAEConfig(block_out_channels=(32, 32, 64, 64)),
        open_clip=open_clip,
        layers=24 if open_clip else 2,
    )
    save_safetensors(tensors, tmp_path / "model.safetensors")
    start = read_start(tmp_path / "model.safetensors")
    assert start.network == network
    assert start.text.num_hidden_layers == (23 if open_clip else 2)


def test_a_dit_is_planned_from_its_folder(pipeline: Pipeline, tmp_path: Path) -> None:
    shape = DiTConfig(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=16)
    network = DiT(replace(shape, cross_attention_dim=pipeline.text_encoder.width))
    Pipeline(
        unet=network,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        diffusion=pipeline.diffusion,
    ).save_pretrained(tmp_path / "dit")
    plan = make_plan(settings(tmp_path / "dit"), **GPU)
    assert plan.kind == "dit"
    assert plan.footprint.num_parameters == sum(p.numel() for p in network.parameters())
    with pytest.raises(ValueError, match=r"lora must be null: init=.* has a dit"):
        make_plan(settings(tmp_path / "dit", **lora()), **GPU)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_lora_holds_what_its_learner_does(
    folder: Path, text_encoder: bool, precision: str
) -> None:
    """Weights, moments and average of the step that trains; frozen weights are there once."""
    given = settings(folder, mixed_precision=precision, **lora(text_encoder=text_encoder))
    plan = make_plan(given, **GPU)
    workload = make_workload(given, precision=precision)
    learner = make_learner(workload.model(), warmup_steps=0)
    learner.update(torch.stack([p.square().sum() for p in learner.trained.values()]).sum())

    def held(prefix: str, without: str = "no such name") -> int:
        tensors = learner.tensors().items()
        return sum(t.nbytes for n, t in tensors if n.startswith(prefix) and without not in n)

    everything = [*learner.model.parameters(), *learner.model.buffers()]
    assert plan.resident["weights"] == sum(t.nbytes for t in everything)
    assert plan.resident["optimizer state"] == held("optimizer.", ".step")
    own = {t.data_ptr() for t in everything}
    average = [*learner.ema.parameters(), *learner.ema.buffers()]
    copied = [t for t in average if t.data_ptr() not in own]
    assert plan.resident["weight averages"] == sum(t.nbytes for t in copied)
    assert plan.footprint.num_parameters == sum(p.numel() for p in learner.trained.values())
    assert plan.checkpoint_bytes == pytest.approx(held("", ".step"), abs=200)  # numbers of places
    half = torch.float32 if precision == "no" else torch.bfloat16
    assert {p.dtype for p in everything if not p.requires_grad and p.is_floating_point()} == {half}
    assert {p.dtype for net in workload.frozen() for p in net.parameters()} == {half}


@pytest.mark.exhaustive
def test_of_a_whole_network_the_frozen_ones_stay_in_float32(folder: Path) -> None:
    full, half = (make_plan(settings(folder, mixed_precision=p), **GPU) for p in ("no", "bf16"))
    assert full.resident == half.resident
    assert full.resident["weight averages"] == full.resident["weights"]


@pytest.mark.exhaustive
def test_moments_of_eight_bits_are_planned(folder: Path) -> None:
    given = settings(folder, optimizer="adamw8bit")
    plan = make_plan(given, **GPU)
    sizes = [p.numel() for p in make_workload(given).model().parameters()]
    assert plan.resident["optimizer state"] == sum(map(moment_bytes, sizes))
    with pytest.raises(ValueError, match="optimizer='adamw8bit' must be 'adamw' with sharding="):
        make_plan({**given, "sharding": "full"}, **GPU, processes=2)


def test_inpainting_has_channels_for_mask_and_masked_image(
    folder: Path, pipeline: Pipeline
) -> None:
    plain, painting = (make_plan(settings(folder, inpainting=on), **GPU) for on in (False, True))
    more = painting.footprint.num_parameters - plain.footprint.num_parameters
    assert more == 5 * 9 * pipeline.unet.config.block_out_channels[0]


def test_states_of_few_captions_are_kept(folder: Path, pipeline: Pipeline) -> None:
    few, many = (make_plan(settings(folder), **GPU, images=n) for n in (20, 2000))
    context = pipeline.text_encoder(["a caption"])
    assert few.resident["text states"] == 21 * 4 * context[0].numel()
    assert many.resident["text states"] == 0
    trained = make_plan(settings(folder, **lora(text_encoder=True)), **GPU, images=20)
    assert trained.resident["text states"] == 0


def test_the_largest_micro_batch_is_not_0_where_one_fits() -> None:
    """At 512² SD 1.5's gradients are the peak of one image and activations that of two; the line
    through both lay so far below that of more images that the search came down to 0."""

    def peak(n: int) -> float:
        return max(16.7 + 0.1 * n, 13.6 + 2.7 * n)

    for limit, largest in ((21.6, 2), (17.0, 1), (16.0, 0), (100.0, 32)):
        assert _largest(peak, 1, peak(1), limit) == largest
        assert _largest(peak, 8, peak(8), limit) == largest


def test_the_largest_micro_batch_is_found_soon_where_memory_grows_with_its_square() -> None:
    """As CLIP's does: each image has a similarity to each text. The line from above alone took 51
    plans of a step."""
    tried = []

    def peak(n: int) -> float:
        tried.append(n)
        return 1e8 + 2e6 * n + 1.2e4 * n * n

    assert _largest(peak, 4, peak(4), 2.2e10) == 1270
    assert len(tried) <= 20


def test_on_a_cpu_the_model_must_be_read_first(folder: Path, pipeline: Pipeline) -> None:
    """In float32, before what a LoRA leaves as it is becomes bfloat16."""
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder.model)
    size = sum(4 * p.numel() for network in networks for p in network.parameters())
    given = settings(folder, batch_size=1, mixed_precision="bf16", **lora())
    plan = make_plan(given, device=ANY, gpu=False, memory=size + 1)
    assert plan.read_peak == size
    assert plan.fits == (plan.peak <= size)
    too_little = make_plan(given, device=ANY, gpu=False, memory=size - 1)
    assert not too_little.fits
    assert too_little.max_micro_batch_size == 0
    assert make_plan(given, **GPU).read_peak == 0


def fitted(given: dict[str, Any], limit: float, **run: Any) -> tuple[dict[str, Any], Plan]:
    """The options that are found, and the plan with them."""
    run = {**GPU, **run}
    limit /= 1 - 0.1  # of which a tenth is left
    fitting = find_fitting_options(given, make_plan(given, memory=limit, **run), **run)
    assert fitting is not None
    plan = make_plan(with_options(given, fitting.options), memory=limit, **run)
    assert fitting.peak == plan.peak
    assert fitting.fits == plan.fits
    return dict(fitting.options), plan


@pytest.mark.exhaustive
def test_what_makes_it_fit_is_what_costs_least() -> None:
    given = vae(16, 6, 32)
    whole = make_plan(given, **GPU).peak
    assert fitted(given, 0.9 * whole)[0] == {"gradient_accumulation_steps": 2}
    single = {**given, "batch_size": 1}
    whole = make_plan(single, **GPU).peak
    assert fitted(single, 0.95 * whole)[0] == {"gradient_checkpointing": True}


@pytest.mark.exhaustive
def test_no_option_is_named_without_which_it_fits(folder: Path) -> None:
    given = settings(folder, batch_size=1)
    as_lora = make_plan({**given, **lora(rank=16)}, **GPU).peak
    options, _ = fitted(given, 1.01 * as_lora)
    assert "lora.rank" in options
    for name in options:
        fewer = {key: value for key, value in options.items() if key != name}
        assert make_plan(with_options(given, fewer), **GPU).peak > 1.01 * as_lora


@pytest.mark.exhaustive
def test_where_nothing_makes_it_fit_the_smallest_is_named(folder: Path) -> None:
    given = settings(folder, batch_size=1)
    _, plan = fitted(given, 1000.0)
    for options in ({"mixed_precision": "bf16"}, lora(rank=16), {"optimizer": "adamw8bit"}):
        assert plan.peak <= make_plan({**given, **options}, **GPU).peak


@pytest.mark.exhaustive
def test_several_processes_shard_before_they_round() -> None:
    given = unet(32, 2, 32)
    whole = make_plan(given, **GPU, processes=2).peak
    options, _ = fitted(given, 0.7 * whole, processes=2)
    assert options.get("sharding") == "full"
    assert "optimizer" not in options


def test_the_command_needs_no_configuration_and_says_what_makes_it_fit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_lora = make_plan(
        settings(folder, batch_size=1, mixed_precision="bf16", **lora(rank=16)), **GPU
    )
    memory = as_lora.peak * 1.01 / 0.9 / 2**30
    command = ["plan", "--init", str(folder), "--image_size", "16", "--batch_size", "1"]
    command += ["--device", "rtx-4090", "--device_memory", str(memory)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "does NOT fit" in printed
    words = printed.split("; it fits with ")[1].splitlines()[0]
    assert main([*command, *words.split()]) == 0
    printed = capsys.readouterr().out
    assert "does NOT fit" not in printed


WRONG = [
    ({"lora": {"rank": 4}, "init": None, **unet(32, 2, 32)}, "lora has no effect with init=null"),
    (lora(width=3), r"lora\.width is unknown; lora has weights, rank"),
    (lora(rank=4096), r"lora\.rank=4096 must be at most 16, the rank of"),
    ({"init": "nobody/nothing"}, "is neither a file, a folder nor a model in the cache of the"),
    ({"vae": "sd15", "text_encoder": "sd15"}, "cross_attention_dim=16 of the network of init="),
    ({"image_size": None}, "image_size is missing"),
    ({"inpainting": True, **lora()}, "lora must be null: init=.* has no channels for masks"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG)
def test_what_cannot_be_is_refused(folder: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_plan(settings(folder) | change, **GPU)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a whole pipeline folder"):
        make_plan(settings(tmp_path), **GPU)
    assert main(["plan", "--device", "l4"]) == 2


# --- students


def test_a_student_takes_all_its_steps_and_its_guided_teacher_finer_ones(folder: Path) -> None:
    """Of each example: four passes forward and backward, and both halves of twenty."""
    tuned = make_plan(settings(folder), **GPU)
    student = make_plan(read_settings(None, distilling(folder)), **GPU)
    text = tuned.training_flop - 3 * tuned.forward_flop
    assert student.forward_flop == 4 * tuned.forward_flop
    assert abs(student.training_flop / (52 * tuned.forward_flop + text) - 1) < 1e-3
    more = student.footprint.frozen - tuned.footprint.frozen
    assert more == tuned.footprint.weights
    assert student.checkpoint_bytes == tuned.checkpoint_bytes


def test_a_teacher_is_in_the_precision_of_the_run(folder: Path) -> None:
    tuned = make_plan(settings(folder, mixed_precision="bf16"), **GPU)
    given = read_settings(None, {**distilling(folder), "mixed_precision": "bf16"})
    student = make_plan(given, **GPU)
    assert student.footprint.frozen - tuned.footprint.frozen == tuned.footprint.weights // 2


def test_a_student_as_a_lora_has_the_moments_of_a_lora(folder: Path) -> None:
    tuned, student = (
        make_plan(read_settings(None, {**given, **lora(rank=4)}), **GPU)
        for given in (settings(folder), distilling(folder))
    )
    assert student.checkpoint_bytes == tuned.checkpoint_bytes
    assert student.footprint.num_parameters == tuned.footprint.num_parameters
    more = student.footprint.frozen - tuned.footprint.frozen
    assert more == tuned.footprint.weights - 4 * tuned.footprint.num_parameters  # the teacher


def distilling(teacher: Path) -> dict[str, Any]:
    return {"teacher": str(teacher), "batch_size": 2, "image_size": 16, "mixed_precision": "no"}


@pytest.mark.parametrize("name", ["init", "vae", "text_encoder"])
def test_a_student_has_its_teachers_networks(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=emoji does not go with teacher="):
        read_settings(None, {**distilling(folder), name: "emoji"})


def test_a_name_is_no_part_of_a_project(tmp_path: Path) -> None:
    """ "emoji" in emoji.yaml is the embedded model, not a folder that the file would train."""
    config = tmp_path / "emoji.yaml"
    config.write_text("teacher: emoji\nbatch_size: 2\nimage_size: 64\n")
    assert read_settings(config, {})["teacher"] == "emoji"


def test_a_distillation_is_planned_from_its_configuration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "distill.yaml"
    config.write_text(f"teacher: {folder}\nbatch_size: 2\nimage_size: 16\nmixed_precision: 'no'\n")
    assert main(["plan", "--config", str(config), "--device", "t4"]) == 0
    assert f"a student of {folder}" in capsys.readouterr().out
