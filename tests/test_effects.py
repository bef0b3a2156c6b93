"""Options that have no effect beside others are refused, and defaults stay silent."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cases import mostly_exhaustive
from support.scripts import CONFIGS, ROOT, config_class

from latentdiff.options import check_effects, flat_fields, option, value_of
from latentdiff.training.command_line import parse_config


def parse(name: str, *args: str) -> Any:
    return parse_config(config_class(name), args)[0]


VOID = [
    # A cache has its own data: a path that is nowhere was recorded as what was trained on.
    ("train_unet", "--cache=there --data=nowhere", "data=nowhere has no effect with cache=there"),
    ("train_unet", "--cache=there --caption_columns=[name]", "caption_columns=['name'] has no"),
    ("train_unet", '--cache=there --caption_templates={"text":["{}"]}', "caption_templates="),
    ("train_unet", "--cache=there --image_size=64", "image_size=64 has no effect with cache=the"),
    ("train_unet", "--cache=there --bucket_step=8", "bucket_step=8 has no effect with cache="),
    ("train_unet", "--cache=there --flip=true", "flip=true has no effect with cache=there"),
    ("train_unet", "--cache=there --crops=2", "crops=2 has no effect with cache=there"),
    ("train_unet", "--cache=there --check_latents=false", "check_latents=false has no effect"),
    ("train_unet", "--cache=there --stream=true", "stream=true has no effect with cache=there"),
    (
        "train_unet",
        "--cache=there --in_memory=true --num_workers=2",
        "num_workers=2 has no effect with cache=there, in_memory=true",
    ),
    ("train_unet", "--stream=true --shuffle_buffer=9", "shuffle_buffer=9 has no effect in this"),
    ("cache_latents", "--stream=true --shuffle_buffer=9", "shuffle_buffer=9 has no effect in th"),
    ("train_vae", "--shuffle_buffer=9", "shuffle_buffer=9 has no effect with stream=false"),
    ("train_vae", "--bucket_step=8", "bucket_step=8 has no effect in this script"),
    ("train_clip", "--bucket_step=8", "bucket_step=8 has no effect in this script"),
    ("cache_latents", "--max_aspect=3", "max_aspect=3.0 has no effect with bucket_step=0"),
    ("train_vae", "--allow_empty_caption=true", "allow_empty_caption=true has no effect with cap"),
    # One network in place of another, and what follows from other parts.
    ("train_unet", "--dit.patch_size=2 --unet.layers_per_block=2", "unet has no effect with dit"),
    ("train_unet", "--unet.sample_size=32", "unet.sample_size=32 has no effect in this script"),
    ("train_unet", "--dit.in_channels=16", "dit.in_channels=16 has no effect in this script"),
    ("train_unet", "--unet.addition_embed_type_num_heads=8", "no effect with unet.addition_embed"),
    ("train_vae", "--vae.sample_size=32", "vae.sample_size=32 has no effect in this script"),
    # Parts of losses and optimizers that are not there.
    ("train_vae", "--muon_learning_rate=0.006", "muon_learning_rate=0.006 has no effect with opti"),
    ("train_vae", "--disc_start=9", "disc_start=9 has no effect with disc_weight=0.0"),
    ("train_vae", "--perceptual_weights=x", "perceptual_weights=x has no effect with percept"),
    ("train_vae", "--init=emoji --decoder_only=true --kl_weight=1", "kl_weight=1.0 has no effect"),
    ("train_vae", "--vae.encoder=downsample --vae.latent_channels=3 --kl_weight=1", "kl_weight=1."),
    ("train_unet", "--snr_gamma=5", "snr_gamma=5.0 has no effect with weighting=none"),
    ("train_unet", "--weighting=min_snr --p2_gamma=1", "p2_gamma=1.0 has no effect with weightin"),
    ("train_unet", "--logit_std=2", "logit_std=2.0 has no effect with timestep_distribution=unif"),
    ("train_unet", "--vlb_weight=1", "vlb_weight=1.0 has no effect with diffusion.learned_varian"),
    (
        "train_unet",
        "--diffusion.schedule=flow --diffusion.prediction=v_prediction --diffusion.steps_offset=0",
        "diffusion.steps_offset=0 has no effect with diffusion.timestep_spacing=trailing",
    ),
    # A model to start from has a network of its own, and without one there is nothing to change.
    ("train_unet", "--init=emoji --unet.layers_per_block=2", "unet has no effect with init=emoji"),
    ("train_unet", "--init=emoji --dit.patch_size=2", "dit has no effect with init=emoji"),
    ("train_unet", "--lora.rank=4", "lora has no effect with init=null"),
    # What is done never.
    ("train_unet", "--snapshot_every=9", "snapshot_every=9 has no effect with ema_lengths=[]"),
    ("train_vae", "--validate_every=9", "validate_every=9 has no effect in this script"),
    ("train_unet", "--val_fraction=0 --validate_every=9", "validate_every=9 has no effect with v"),
    ("train_clip", "--val_fraction=0 --validate_every=9", "validate_every=9 has no effect with v"),
]


@pytest.mark.parametrize(("name", "args", "message"), mostly_exhaustive(VOID, quick=4))
def test_an_option_without_an_effect_is_refused(name: str, args: str, message: str) -> None:
    """Each was taken without a word, and config.yaml recorded it as if it had been used."""
    with pytest.raises(ValueError, match=r"; leave it out$") as caught:
        parse(name, *args.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


WITH_EFFECT = [
    ("train_unet", "--cache=there --num_workers=2"),
    ("train_unet", "--cache=null --data=there --image_size=32 --flip=true --in_memory=true"),
    ("train_unet", "--dit.patch_size=2"),
    ("train_unet", "--weighting=min_snr --snr_gamma=5"),
    ("train_unet", "--ema_lengths=[0.1] --snapshot_every=9"),
    ("train_unet", "--optimizer=muon --muon_learning_rate=0.006"),
    ("train_vae", "--init=emoji --decoder_only=true"),
    ("train_vae", "--disc_weight=0.5 --disc_start=9"),
    ("train_clip", "--init=emoji --clip.image_layers=2"),
    ("cache_latents", "--bucket_step=8 --max_aspect=3 --stream=true"),
]


@pytest.mark.parametrize(("name", "args"), mostly_exhaustive(WITH_EFFECT, quick=2))
def test_an_option_with_an_effect_is_taken(name: str, args: str) -> None:
    parse(name, *args.split())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_with_every_option_is_no_list_of_wishes(tmp_path: Path, name: str) -> None:
    """A run's config.yaml and --print_config have all: there a default asks for nothing."""
    _, text = parse_config(config_class(name), [])
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    args = {"train_unet": ["--cache=there", "--dit.patch_size=2"], "train_clip": ["--init=emoji"]}
    parse(name, f"--config={path}", *args.get(name, []))
    if name != "train_unet":
        return
    path.write_text(yaml.safe_dump(yaml.safe_load(text) | {"cache": "there", "flip": True}))
    with pytest.raises(ValueError, match=r"^flip=true has no effect with cache=there"):
        parse(name, f"--config={path}")


def test_a_run_records_what_has_an_effect_and_nothing_else() -> None:
    """config.yaml told of data=shapes and image_size=64 whatever the cache was made of."""
    _, text = parse_config(config_class("train_unet"), ["--cache=there", "--dit.patch_size=2"])
    recorded = yaml.safe_load(text)
    assert recorded["cache"] == "there"
    assert recorded["num_workers"] == 0
    without = ("data", "image_size", "caption_columns", "flip", "unet", "muon_learning_rate")
    assert not any(name in recorded for name in without)
    _, text = parse_config(config_class("train_unet"), ["--optimizer=muon"])
    recorded = yaml.safe_load(text)
    assert recorded["muon_learning_rate"] == 0.006
    assert {"data", "image_size", "unet"} <= recorded.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_condition_names_options_that_are_there(name: str) -> None:
    """And holds or not: a misspelt value would refuse the option for ever."""
    cls = config_class(name)
    config = cls()
    declared = {one.name: one.metadata.get("needs") for one in flat_fields(cls)}
    for path, needs in {**declared, **getattr(cls, "NEEDS", {})}.items():
        value_of(config, path)
        for condition in re.split(" or | and ", needs or ""):
            value_of(config, condition.partition("=")[0] or path)


@dataclass(frozen=True)
class Fruit:
    """A configuration with a condition of each kind."""

    kind: str = "apple"
    stone: bool = False
    size: int | None = None
    weight: float = option(1.0, needs="size or stone=true")
    colour: str = option("red", needs="kind=apple")


@pytest.mark.parametrize(
    ("fruit", "typed", "refused"),
    [
        (Fruit(), [], None),
        (Fruit(weight=2.0), [], "weight=2.0 has no effect with size=null, stone=false"),
        (Fruit(), ["weight"], "weight=1.0 has no effect with size=null, stone=false"),
        (Fruit(weight=2.0, stone=True), ["weight"], None),
        (Fruit(weight=2.0, size=3), [], None),
        (Fruit(kind="plum"), [], None),
        (Fruit(kind="plum"), ["colour"], "colour=red has no effect with kind=plum"),
    ],
)
def test_a_condition_holds_by_a_value_or_where_an_option_is_on(
    fruit: Fruit, typed: list[str], refused: str | None
) -> None:
    assert {one.name for one in fields(fruit)} >= set(typed)
    if refused is None:
        check_effects(fruit, typed)
        return
    with pytest.raises(ValueError, match=f"^{refused}; leave it out$"):
        check_effects(fruit, typed)


def test_the_configurations_of_the_documents_have_no_idle_option(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    path = tmp_path / "sd15.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    parse("train_unet", f"--config={path}", "--ema_lengths=[0.05]")
