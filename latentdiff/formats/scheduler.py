"""scheduler/scheduler_config.json: a `Diffusion`'s fields to the keys of diffusers, and back.

The keys, and the defaults of those that a file lacks, are those of diffusers 0.42.1.
"""

from typing import Any

from latentdiff.formats.header import short_repr

_COSINE = "squaredcos_cap_v2"

# We divide v by alpha^2 + sigma^2 when x0 is computed; on a flow diffusers' v_prediction does not.
_FLOW_V_PREDICTION = "normalized_v_prediction"

# A published configuration may lack any key, which then has the default of its class.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
}
_LEADING = {"timestep_spacing": "leading"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _LEADING,
    "DDIMParallelScheduler": _LEADING,
    "DDPMScheduler": _LEADING,
    "DDPMParallelScheduler": _LEADING,
    "PNDMScheduler": _LEADING | {"set_alpha_to_one": False},
    "LCMScheduler": _LEADING | _SD_BETAS | {"beta_schedule": "scaled_linear"},
    "TCDScheduler": _LEADING | _SD_BETAS | {"beta_schedule": "scaled_linear"},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": _SD_BETAS,
    "KDPM2DiscreteScheduler": _SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SD_BETAS,
    "DPMSolverSDEScheduler": _SD_BETAS,
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "SASolverScheduler": {},
    "UniPCMultistepScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
    },
}

# Of ours alone, and private, so that diffusers passes over it.
DISTILLED_STEPS = "_distilled_steps"

# Keys that change the noise levels or the network's output, and their supported values.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", _COSINE),
    "trained_betas": (None,),
    "thresholding": (None, False),
    "variance_type": (
        None,
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned_range",
    ),
    "timestep_type": (None, "discrete"),
    "flow_shift": (1.0,),
    "shift": (None, 1.0),
    "shift_terminal": (None,),
    "use_dynamic_shifting": (None, False),
    "invert_sigmas": (None, False),
}

# Types of the keys that are read; a bool is not accepted as a number, though it is one in Python.
_TYPES: dict[str, tuple[type, ...]] = {
    "num_train_timesteps": (int,),
    "beta_start": (int, float),
    "beta_end": (int, float),
    "prediction_type": (str,),
    "timestep_spacing": (str,),
    "steps_offset": (int,),
    "set_alpha_to_one": (bool,),
    "rescale_betas_zero_snr": (bool,),
    "use_flow_sigmas": (bool,),
}
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}

_LEARNED_VARIANCE = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
# lambda_min_clipped is left at its default, -infinity, which JSON cannot write.
_FLOW_SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_schedule": _DEFAULTS["beta_schedule"],  # unused, as use_flow_sigmas is true
    "use_flow_sigmas": True,
    "flow_shift": 1.0,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "variance_type": None,
}


# What a student draws with: DDIM, which is this solver's first order, on a flow too.
_FLOW_STUDENT = {"solver_order": 1}


def to_config(
    *,
    schedule: str,
    prediction: str,
    num_timesteps: int,
    beta_start: float | None,
    beta_end: float | None,
    timestep_spacing: str,
    steps_offset: int,
    set_alpha_to_one: bool,
    rescale_betas_zero_snr: bool,
    learned_variance: bool,
    distilled_steps: int | None = None,
) -> dict[str, Any]:
    """The configuration of the diffusers scheduler that samples from such a diffusion.

    DDIMScheduler for beta schedules, DPMSolverMultistepScheduler for `flow` (its own
    FlowMatchEulerDiscreteScheduler does not fit StableDiffusionPipeline), and where the variance is
    learned DDPMScheduler: it splits the network's output at the sample's own channels and draws
    with the variance, where diffusers' DPM-Solvers keep the first three channels, of whatever
    latents, and DDIM splits nothing. A student, with `distilled_steps`, has the solver's first
    order on a flow, which is DDIM.
    Every key is written, since the classes' defaults are rarely what is meant. Three pairs have no
    name in diffusers: `score`, `flow_prediction` on beta schedules, `v_prediction` on `flow`. They
    are written under names of ours, at which diffusers stops in the first step rather than draw a
    wrong image.
    """
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": num_timesteps,
        "beta_start": _DEFAULTS["beta_start"] if beta_start is None else beta_start,
        "beta_end": _DEFAULTS["beta_end"] if beta_end is None else beta_end,
        "beta_schedule": _COSINE if schedule == "cosine" else schedule,
        "trained_betas": None,
        "prediction_type": prediction,
        "timestep_spacing": timestep_spacing,
        "steps_offset": steps_offset,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "rescale_betas_zero_snr": rescale_betas_zero_snr,
    }
    if distilled_steps is not None:
        config[DISTILLED_STEPS] = distilled_steps
    if schedule == "flow":
        if prediction == "v_prediction":
            config["prediction_type"] = _FLOW_V_PREDICTION
        return config | _FLOW_SOLVER | ({} if distilled_steps is None else _FLOW_STUDENT)
    config |= {"clip_sample": False, "clip_sample_range": 1.0, "set_alpha_to_one": set_alpha_to_one}
    return config | (_LEARNED_VARIANCE if learned_variance else {})


def from_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the `Diffusion` that a diffusers scheduler was configured for.

    Keys that concern sampling alone (solver, Karras levels, …) are ignored, and `clip_sample` is
    off, as in StableDiffusionPipeline. Raises ValueError for an
    unknown scheduler class, for a value of a wrong type, and for one that would change the noise
    levels or the meaning of the network's output in a way that is not supported.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASS_DEFAULTS:
        known = ", ".join(_CLASS_DEFAULTS)
        raise ValueError(f"scheduler _class_name={short_repr(name)} must be one of {known}")
    values = _DEFAULTS | _CLASS_DEFAULTS[name] | config
    for key, supported in _SUPPORTED.items():
        if values.get(key) not in supported:
            allowed = " or ".join(str(value) for value in supported if value is not None)
            raise ValueError(
                f"scheduler {key}={short_repr(values[key])} is not supported, only "
                f"{allowed or None}"
            )
    for key, types in _TYPES.items():
        value = values[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"scheduler {key}={short_repr(value)} must be {_WORDS[types[-1]]}")
    steps = values.get(DISTILLED_STEPS)
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
        raise ValueError(f"scheduler {DISTILLED_STEPS}={short_repr(steps)} must be a whole number")
    prediction = values["prediction_type"]
    fields: dict[str, Any] = {
        "prediction": prediction,
        "num_timesteps": values["num_train_timesteps"],
        "timestep_spacing": values["timestep_spacing"],
        "steps_offset": values["steps_offset"],
        "learned_variance": values.get("variance_type") == "learned_range",
        "distilled_steps": steps,
    }
    if values["use_flow_sigmas"]:
        if prediction == "v_prediction":
            raise ValueError("scheduler prediction_type=v_prediction is not supported on a flow")
        if prediction == _FLOW_V_PREDICTION:
            fields["prediction"] = "v_prediction"
        return fields | {"schedule": "flow"}
    for key in ("set_alpha_to_one", "rescale_betas_zero_snr"):
        fields[key] = values[key]
    if values["beta_schedule"] == _COSINE:
        return fields | {"schedule": "cosine"}
    betas = {"beta_start": values["beta_start"], "beta_end": values["beta_end"]}
    return fields | betas | {"schedule": values["beta_schedule"]}
