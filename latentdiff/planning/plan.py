"""The preflight of a training run: its arithmetic, memory, time and disk, before anything starts.

It reads a configuration of train_unet.py, train_vae.py or train_clip.py as the script writes it
whole, and knows nothing of the data but its size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import find_component
from latentdiff.formats.weights import load_json
from latentdiff.models.clip import CLIPSize, new_clip
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.text_config import tower_config
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, Posterior, VAEConfig
from latentdiff.planning.devices import Device
from latentdiff.planning.footprint import Footprint, Model, Passes, Sharding, Work, footprint
from latentdiff.tasks.vae.losses import vae_loss

SD15 = "sd15"
"""In place of a folder for `vae` and `text_encoder`: the shapes of Stable Diffusion 1.x."""
# Shapes of the text tower of CLIP ViT-L/14 (Radford et al. 2021, table 20), SD 1.x's.
_SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
}
# Keys in which the defaults of a script differ from those of its network's class.
_NEEDED = {
    "dit": (),
    "unet": ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block"),
    "vae": ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention"),
    "clip": tuple(field.name for field in fields(CLIPSize)),
}
_NETWORKS = {"dit": DiTConfig, "unet": UNetConfig, "vae": VAEConfig, "clip": CLIPSize}

HEAP, HEAP_BY_BLOCKS = 1.45, 2.4
"""On a CPU: bytes that a step takes for each byte of its tensors, for glibc keeps freed blocks; the
second where a network's blocks take and free much one after the other, as with gradient
checkpointing and sharding "full". What is held all the time takes what it is.

Measured with torch 2.12.1 on Linux: 1.35 to 1.66, and 1.8 to 2.9."""
MARGIN = 0.1
"""Share of a GPU's memory that is left to the driver, workspaces and fragmentation: assumed."""


@dataclass(frozen=True)
class Plan:
    """What was counted for one process, and what follows for the run; bytes, FLOP and seconds."""

    kind: str
    precision: str
    parts: int
    """Examples of one part of one process's share of the batch."""
    footprint: Footprint
    resident: Mapping[str, int]
    peak: float
    """Of one process; on the CPU with what the heap loses, without Python and its libraries."""
    limit: float | None
    """The memory that a process may take, or None if that of the device is not known."""
    largest: int | None
    """The largest part that stays under the limit, 0 if none does, None without a limit."""
    forward_flop: float
    """Of the model, an image."""
    training_flop: float
    """An image in training: forward, backward, frozen networks."""
    images_per_second: float
    """Of all processes together."""
    cache_bytes: int | None
    """At most, of all views of an image's latent moments in float16; None if none are cached."""
    checkpoint_bytes: int
    """Weights, averages and both moments of AdamW of one checkpoint, of all processes together."""
    snapshot_bytes: int
    """The averages of `ema_lengths` in float16, as one step's snapshots keep them."""


def read_settings(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration file with what is not None of `overrides`; ValueError for another file."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a YAML mapping, such as a training script reads")
    settings |= {key: value for key, value in overrides.items() if value is not None}
    return settings


def make_plan(
    settings: Mapping[str, Any],
    *,
    device: Device,
    gpu: bool,
    processes: int = 1,
    memory: float | None = None,
    efficiency: float = 0.4,
) -> Plan:
    """Run a step of the configured training without numbers, and say what follows.

    `memory` (bytes) replaces that of the device; `efficiency` is the share of the device's peak
    that training reaches. Raises ValueError, naming the key, for settings that are missing or
    do not fit together.
    """
    for name, value in (("processes", processes), ("efficiency", efficiency), ("memory", memory)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    batch_size = _count(settings, "batch_size")
    accumulation = _count(settings, "gradient_accumulation_steps", 1)
    if batch_size % (processes * accumulation):
        raise ValueError(
            f"batch_size={batch_size} must be divisible by {processes * accumulation}: "
            f"{processes} processes with gradient_accumulation_steps={accumulation}"
        )
    passes = _passes(settings, device=device, gpu=gpu, processes=processes)
    lengths = len(settings.get("ema_lengths") or ())
    kind, work, cache_bytes = work_of(settings, processes=processes, gpu=gpu)

    by_blocks = passes.gradient_checkpointing or passes.split == "full"
    heap = 1.0 if gpu else HEAP_BY_BLOCKS if by_blocks else HEAP

    def look(part: int) -> tuple[Footprint, Mapping[str, int], float]:
        found = footprint(work, part, accumulation=accumulation, passes=passes)
        resident = found.resident(averages=1 + lengths)
        if passes.split == "full" and not gpu:  # whole at first, and the heap keeps what it was in
            resident["weights before they were split"] = found.weights
        return found, resident, sum(resident.values()) + found.step * heap

    part = batch_size // (processes * accumulation)
    found, resident, peak = look(part)
    limit = device.memory if memory is None else memory
    limit = None if limit is None else limit * (1 - MARGIN if gpu else 1.0)
    training = found.step_flop / part
    precision = passes.precision
    return Plan(
        kind=kind,
        precision=precision,
        parts=part,
        footprint=found,
        resident=resident,
        peak=peak,
        limit=limit,
        largest=None if limit is None else _largest(lambda n: look(n)[2], part, peak, limit),
        forward_flop=found.forward_flop / part,
        training_flop=training,
        images_per_second=processes * efficiency * device.flops[precision] / training,
        cache_bytes=cache_bytes,
        checkpoint_bytes=found.weights + 4 * found.parameters * (1 + lengths + 2),
        snapshot_bytes=2 * found.parameters * lengths,
    )


def _passes(settings: Mapping[str, Any], *, device: Device, gpu: bool, processes: int) -> Passes:
    """How the settings have the network run; ValueError for a value that they cannot have."""
    precision = settings.get("mixed_precision", "auto")
    precision = device.precision if precision == "auto" else precision
    sharding = settings.get("sharding", "none")
    recomputing = settings.get("gradient_checkpointing", False)
    for name, value, allowed in (
        ("mixed_precision", precision, sorted(device.flops)),
        ("sharding", sharding, get_args(Sharding)),
        ("gradient_checkpointing", recomputing, (True, False)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, allowed))} here")
    if processes > 1 and sharding != "none" and precision == "fp16":
        raise ValueError(f"mixed_precision='fp16' must be bf16 or no with sharding={sharding!r}")
    return Passes(
        precision=precision,
        gradient_checkpointing=recomputing,
        processes=processes,
        sharding=sharding,
        gpu=gpu,
    )


def work_of(
    settings: Mapping[str, Any], *, processes: int = 1, gpu: bool = False
) -> tuple[str, Work, int | None]:
    """Which network is trained, how, and the bytes at most of an image in a latent cache, if any.

    Raises ValueError, naming the key, for settings that are missing or do not fit together.
    """
    kind, network = _network(settings)
    if isinstance(network, UNetConfig | DiTConfig):
        return kind, *_denoiser(settings, network)
    if isinstance(network, VAEConfig):
        return kind, _vae(settings, network, _count(settings, "image_size")), None
    return kind, _clip(settings, network, processes=processes, eager=not gpu), None


def _largest(peak_of: Callable[[int], float], part: int, peak: float, limit: float) -> int:
    """The most examples whose peak stays under the limit; the peak grows in pieces of lines."""
    other = part + 1 if part == 1 else 1
    slope = (peak_of(other) - peak) / (other - part)
    n = max(0, int(part + (limit - peak) / slope))
    while n and (over := peak_of(n) - limit) > 0:
        n = max(0, n - max(1, int(over / slope)))
    return n


def _network(
    settings: Mapping[str, Any],
) -> tuple[str, UNetConfig | DiTConfig | VAEConfig | CLIPSize]:
    kinds = [kind for kind in _NETWORKS if isinstance(settings.get(kind), dict)]
    if kinds == ["dit", "unet"]:  # the script trains the first then, and has keys of both
        kinds = ["dit"]
    if len(kinds) != 1:
        raise ValueError(
            "the configuration must have one of unet, dit, vae and clip with the network's keys; "
            "a training script with --print_config writes all"
        )
    kind = kinds[0]
    values = settings[kind]
    missing = [key for key in _NEEDED[kind] if key not in values]
    if missing:
        raise ValueError(
            f"{kind}.{missing[0]} is missing; a training script with --print_config writes all"
        )
    known = [field.name for field in fields(_NETWORKS[kind])]
    for key in values:
        if key not in known:
            raise ValueError(f"{kind}.{key} is unknown; {kind} has {', '.join(known)}")
    return kind, _NETWORKS[kind](**values)


def _count(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = settings.get(key, default)
    if value is None:
        raise ValueError(f"{key} is missing; give it in the configuration or as --{key}")
    if type(value) is not int or value < 1:
        raise ValueError(f"{key}={value!r} must be a whole number of at least 1")
    return value


def _denoiser(settings: Mapping[str, Any], config: UNetConfig | DiTConfig) -> tuple[Work, int]:
    """A UNet's or DiT's training, and the bytes of an image in its latent cache."""
    vae, text = _frozen(settings)
    size = _count(settings, "image_size")
    if size % vae.factor:
        raise ValueError(f"image_size={size} must be divisible by {vae.factor}, the VAE's factor")
    C, side = vae.latent_channels, size // vae.factor
    if isinstance(config, DiTConfig) and side % config.patch_size:
        raise ValueError(
            f"patch_size={config.patch_size} must divide {side}, the side of the latents"
        )
    config = replace(
        config,
        in_channels=C,
        out_channels=C,
        sample_size=side,
        cross_attention_dim=text.hidden_size,
    )
    diffusion = Diffusion("flow", "flow_prediction")  # all kinds compute the same sizes

    def loss(model: Model, frozen: Sequence[Model], n: int) -> Tensor:
        posterior = Posterior.from_moments(torch.randn(n, 2 * C, side, side))
        x0 = posterior.sample(torch.randn(n, C, side, side))
        with torch.no_grad():
            ids = torch.zeros(n, text.max_position_embeddings or 77, dtype=torch.long)
            context = frozen[0](input_ids=ids).last_hidden_state
        t = torch.rand(n) * diffusion.num_timesteps
        noise = torch.randn(n, C, side, side)
        return diffusion.loss(model, x0, context, noise=noise, t=t).mean()

    def frozen() -> list[nn.Module]:
        return [net.requires_grad_(False).eval() for net in (CLIPTextModel(text), VAE(vae))]

    # Those of an image that keeps its shape, in a bucket, are as many at most.
    views = _count(settings, "crops", 1) * (2 if settings.get("flip", False) else 1)

    def network() -> nn.Module:
        return DiT(config) if isinstance(config, DiTConfig) else UNet(config)

    return Work(network, loss, frozen), views * 2 * 2 * C * side * side


def _frozen(settings: Mapping[str, Any]) -> tuple[VAEConfig, CLIPTextConfig]:
    """What the VAE and the text encoder are; of each only config.json is read."""
    vae, text = (settings.get(key, "emoji") for key in ("vae", "text_encoder"))
    if vae == SD15:
        vae_config = VAEConfig()
    else:
        vae_config = VAEConfig.from_dict(load_json(find_component(vae, "vae") / "config.json"))
    if text == SD15:
        text_config = tower_config(_SD15_TEXT)
    else:
        folder = find_component(text, "text_encoder") / "text_encoder"
        text_config = tower_config(load_json(folder / "config.json"))
    return vae_config, text_config


def _vae(settings: Mapping[str, Any], config: VAEConfig, size: int) -> Work:
    for key, needed in (
        ("init", "left out for a plan, with the shapes of its network as vae"),
        ("decoder_only", "False for a plan: the whole network is counted as trained"),
        ("perceptual_weight", "0 for a plan: what LPIPS needs is not counted"),
        ("disc_weight", "0 for a plan: what a discriminator needs is not counted"),
    ):
        if settings.get(key) not in (None, 0):
            raise ValueError(f"{key}={settings[key]!r} must be {needed}")
    if size % config.factor:
        raise ValueError(f"image_size={size} must be divisible by {config.factor}")
    C, side = config.latent_channels, size // config.factor

    def loss(model: Model, frozen: Sequence[Model], n: int) -> Tensor:
        images = torch.rand(n, 3, size, size) * 2 - 1
        reconstruction, posterior = model(images, torch.randn(n, C, side, side))
        return vae_loss(reconstruction, images, posterior, norm="l1", kl_weight=1e-3)[0]

    return Work(lambda: VAE(config), loss)


def _clip(settings: Mapping[str, Any], size: CLIPSize, *, processes: int, eager: bool) -> Work:
    if settings.get("init") is not None:
        raise ValueError(
            f"init={settings['init']!r} must be left out for a plan, with the shapes of its towers "
            "as clip, vocab_size and max_tokens"
        )
    length, words = _count(settings, "max_tokens"), _count(settings, "vocab_size")
    side = _count(settings, "image_size")
    # A vocabulary of the right length; nothing is ever tokenised with it.
    names = ["<|startoftext|>", "<|endoftext|>", *(f"word{i}" for i in range(2, words))]
    tokenizer = CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=length
    )

    def model() -> nn.Module:
        towers = new_clip(size, tokenizer, image_size=side)
        if eager:  # as train_clip.py does on a CPU
            towers.set_attn_implementation("eager")
        return towers

    def loss(model: Model, frozen: Sequence[Model], n: int) -> Tensor:
        ids = torch.zeros(n, length, dtype=torch.long)
        output = model(input_ids=ids, pixel_values=torch.rand(n, 3, side, side))
        image, text = output.image_embeds.float(), output.text_embeds.float()
        own = torch.arange(n)
        # Each process compares its own images and captions with those of all (open_clip).
        images, captions = image.repeat(processes, 1), text.repeat(processes, 1)
        losses = (100 * image @ captions.T, 100 * text @ images.T)
        return (F.cross_entropy(losses[0], own) + F.cross_entropy(losses[1], own)) / 2

    return Work(model, loss)
