"""scheduler_config.json against diffusers' own classes."""

import dataclasses
import inspect
import json
from itertools import product
from typing import Any, get_args

import diffusers
import pytest
import torch
from support.parity import no_warning_logged

from latentdiff.diffusion import Diffusion, Prediction
from latentdiff.formats import scheduler
from latentdiff.schedules import Schedule

# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PAIRS = [
    (schedule, prediction)
    for schedule, prediction in product(get_args(Schedule), get_args(Prediction))
    if schedule != "flow" or prediction not in ("epsilon", "score")
]
# What diffusers has a word for.
SHARED = [
    *product(("linear", "scaled_linear", "cosine"), ("epsilon", "sample", "v_prediction")),
    ("flow", "flow_prediction"),
    ("flow", "sample"),
]


def their_scheduler(config: dict[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]).from_config(config)


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_a_diffusion_is_the_same_after_writing_and_reading(schedule, prediction):
    for options in (
        {},
        {"num_timesteps": 2000, "timestep_spacing": "linspace", "steps_offset": 0},
        {} if schedule == "flow" else {"set_alpha_to_one": False, "timestep_spacing": "leading"},
        {"rescale_betas_zero_snr": schedule != "flow" and prediction not in ("epsilon", "score")},
        {"learned_variance": schedule != "flow"},
    ):
        diffusion = Diffusion(schedule, prediction, **options)
        text = json.dumps(diffusion.to_scheduler_config(), allow_nan=False)
        assert Diffusion.from_scheduler_config(json.loads(text)) == diffusion
    if schedule in ("linear", "scaled_linear"):
        diffusion = Diffusion(schedule, prediction, beta_start=0.001, beta_end=0.03)
        assert Diffusion.from_scheduler_config(diffusion.to_scheduler_config()) == diffusion


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Diffusion)])
def test_no_field_is_forgotten(field):
    """Each has another value here than its default, and comes back."""
    other = {
        "schedule": "cosine",
        "prediction": "sample",
        "num_timesteps": 1500,
        "beta_start": 0.001,
        "beta_end": 0.03,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "set_alpha_to_one": False,
        "rescale_betas_zero_snr": True,
        "learned_variance": True,
        "distilled_steps": 4,
    }
    diffusion = Diffusion(
        **{"schedule": "linear", "prediction": "v_prediction"} | {field: other[field]}
    )  # pyright: ignore[reportArgumentType]
    assert getattr(diffusion, field) == other[field]
    assert Diffusion.from_scheduler_config(diffusion.to_scheduler_config()) == diffusion


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_key_of_the_class_is_written_and_no_other(schedule):
    config = Diffusion(schedule, "sample").to_scheduler_config()
    assert_every_key(config)


def test_a_learned_variance_is_written_as_the_one_class_that_reads_it():
    """With DDIMScheduler's set_alpha_to_one, over which diffusers loses no word: it is a cousin."""
    config = Diffusion("linear", "epsilon", learned_variance=True).to_scheduler_config()
    assert (config["_class_name"], config["variance_type"]) == ("DDPMScheduler", "learned_range")
    with no_warning_logged():
        theirs = their_scheduler(config)
    assert theirs.variance_type == "learned_range"
    assert config.pop("set_alpha_to_one")
    assert_every_key(config)


def assert_every_key(config: dict[str, Any]) -> None:
    keys = set(inspect.signature(getattr(diffusers, config.pop("_class_name")).__init__).parameters)
    assert set(config) == keys - {"self", "lambda_min_clipped"}


@pytest.mark.parametrize(("schedule", "prediction"), SHARED)
def test_diffusers_reads_our_configuration_as_we_mean_it(schedule, prediction):
    diffusion = Diffusion(schedule, prediction)
    theirs = their_scheduler(diffusion.to_scheduler_config())
    theirs.set_timesteps(20)
    levels = diffusion.levels(20)
    assert torch.equal(theirs.timesteps, levels.timestep[:-1].long())
    if schedule == "flow":
        torch.testing.assert_close(theirs.sigmas, levels.sigma.float())
    else:
        bars = diffusion.alphas_cumprod.float()
        torch.testing.assert_close(theirs.alphas_cumprod, bars, atol=1e-7, rtol=1e-4)
    assert not theirs.config.get("clip_sample")
    x = torch.randn(1, 4, 8, 8)
    theirs.step(torch.randn_like(x), theirs.timesteps[0], x)


@pytest.mark.parametrize(("schedule", "prediction"), sorted(set(PAIRS) - set(SHARED)))
def test_diffusers_stops_at_what_it_has_no_word_for(schedule, prediction):
    """At the first step, and by name: it must not draw a wrong image."""
    theirs = their_scheduler(Diffusion(schedule, prediction).to_scheduler_config())
    theirs.set_timesteps(5)
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=f"prediction_type given as .*{prediction}"):
        theirs.step(x, theirs.timesteps[0], x)


# KDPM2's classes do that when they are constructed.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(scheduler._CLASS_DEFAULTS))
def test_missing_keys_have_the_default_of_their_class(name):
    """SD 1.5's own file, for one, has no timestep_spacing."""
    theirs = dict(getattr(diffusers, name)().config)
    assumed = scheduler._DEFAULTS | scheduler._CLASS_DEFAULTS[name]
    for key in set(assumed) & set(theirs):
        assert assumed[key] == theirs[key], key
    if name == "FlowMatchEulerDiscreteScheduler":
        expected = Diffusion("flow", "flow_prediction", timestep_spacing="linspace", steps_offset=0)
        assert Diffusion.from_scheduler_config({"_class_name": name}) == expected
    else:
        full = Diffusion.from_scheduler_config({"_class_name": name} | theirs)
        assert Diffusion.from_scheduler_config({"_class_name": name}) == full


def test_stable_diffusions_published_configurations_are_read():
    sd15 = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.17.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "thresholding": False,
        "trained_betas": None,
    }
    options = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    expected = Diffusion("scaled_linear", "epsilon", **options)
    assert Diffusion.from_scheduler_config(sd15) == expected
    sd21 = sd15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    expected = Diffusion("scaled_linear", "v_prediction", **options)
    assert Diffusion.from_scheduler_config(sd21) == expected


def test_unipc_flow_is_read():
    config = dict(diffusers.UniPCMultistepScheduler().config)
    config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    diffusion = Diffusion.from_scheduler_config({"_class_name": "UniPCMultistepScheduler"} | config)
    assert (diffusion.schedule, diffusion.prediction) == ("flow", "flow_prediction")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "IPNDMScheduler"},
            "_class_name='IPNDMScheduler' must be one of DDIMSched",
        ),
        ({"_class_name": None}, "_class_name=None must be one of DDIMScheduler"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' is not supported, only linear or "),
        ({"trained_betas": [0.1]}, r"trained_betas=\[0.1\] is not supported, only None"),
        ({"thresholding": True}, "thresholding=True is not supported, only False"),
        ({"rescale_betas_zero_snr": True}, "prediction=epsilon says nothing of x0 where alpha=0"),
        ({"variance_type": "learned"}, "variance_type='learned' is not supported"),
        (
            {
                "variance_type": "learned_range",
                "use_flow_sigmas": True,
                "prediction_type": "sample",
            },
            "learned_variance=True is for beta schedules, not flow",
        ),
        ({"use_flow_sigmas": True, "flow_shift": 3.0}, "flow_shift=3.0 is not supported, only 1.0"),
        (
            {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
            "prediction_type=v_prediction is not supported on a flow",
        ),
        ({"prediction_type": "noise"}, "prediction='noise' must be one of epsilon"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence(config, message):
    with pytest.raises(ValueError, match=message):
        Diffusion.from_scheduler_config({"_class_name": "DPMSolverMultistepScheduler", **config})


WRONG = [
    "many",
    [],
    [1],
    {},
    {"a": 1},
    None,
    True,
    False,
    -1,
    1.5,
    1e400,
    -1e400,
    float("nan"),
    10**30,
]


@pytest.mark.parametrize("name", sorted(scheduler._CLASS_DEFAULTS))
@pytest.mark.filterwarnings("ignore:the end of the noise chain:UserWarning")
def test_any_value_of_a_key_is_read_or_refused_in_one_sentence(name):
    """A file may hold anything: never another error, nor the memory of a huge schedule."""
    keys = scheduler._DEFAULTS.keys() | scheduler._SUPPORTED.keys() | {"_class_name", "unknown"}
    sentences = []
    for key, value in product(sorted(keys), WRONG):
        try:
            Diffusion.from_scheduler_config({"_class_name": name} | {key: value})
        except ValueError as error:
            sentences.append(str(error))
    assert len(sentences) > 100
    assert all("\n" not in sentence and len(sentence) < 700 for sentence in sentences)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_train_timesteps", True, "num_train_timesteps=True must be a whole number"),
        ("num_train_timesteps", 1000.0, "num_train_timesteps=1000.0 must be a whole number"),
        ("num_train_timesteps", 10**12, "num_timesteps=1000000000000 must be 2 to 100000"),
        ("beta_start", "0.1", "beta_start='0.1' must be a number"),
        ("beta_end", float("nan"), "beta_end=nan must be 0 < start"),
        ("set_alpha_to_one", 1, "set_alpha_to_one=1 must be true or false"),
        (
            "prediction_type",
            ["epsilon"] * 99,
            r"prediction_type=\[('epsilon', ){12}\.\.\.\] must be a text",
        ),
        ("_class_name", [], r"_class_name=\[\] must be one of DDIMScheduler"),
    ],
)
def test_values_of_the_wrong_type_are_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        Diffusion.from_scheduler_config({"_class_name": "DDIMScheduler"} | {key: value})
