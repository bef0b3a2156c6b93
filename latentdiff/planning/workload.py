"""Workloads: each network's training step, on images and captions that are made up.

Only shapes matter here. B examples of a micro-batch, C latent channels, H/W latent size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTokenizer

from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import find_component
from latentdiff.formats.weights import load_json
from latentdiff.guidance import guided_denoiser
from latentdiff.models.clip import CLIPSize, new_clip, text_config
from latentdiff.models.clip_text import CLIPText
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.text_config import tower_config
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, Posterior, VAEConfig
from latentdiff.planning.footprint import Model, Workload
from latentdiff.planning.settings import (
    lora_config,
    network_config,
    positive_int,
    read_yaml,
    to_be_made,
)
from latentdiff.planning.start import SD15, SD15_TEXT, read_start
from latentdiff.tasks.denoiser.lora import with_lora
from latentdiff.tasks.denoiser.text import MAX_KEPT
from latentdiff.tasks.distill.config import Distill
from latentdiff.tasks.distill.trajectories import step_errors, trajectory
from latentdiff.tasks.vae.losses import vae_loss


def make_workload(
    settings: Mapping[str, Any], *, processes: int = 1, gpu: bool = False, precision: str = "no"
) -> Workload:
    """The training step of the network that the settings name.

    `precision` is that of the run, and of what is frozen beside a LoRA. Raises ValueError, naming
    the key, for settings that are missing or do not fit together.
    """
    _, network = network_config(settings)
    if isinstance(network, UNetConfig | DiTConfig):
        return _denoiser(settings, network, precision)
    if isinstance(network, VAEConfig):
        return _vae(settings, network)
    return _clip(settings, network, processes=processes, eager=not gpu)


def cache_bytes_per_image(settings: Mapping[str, Any]) -> int | None:
    """Bytes in the latent cache of all variants of an image; None if none is trained from.

    Means and log-variances are in float16; those of the masked image and the mask come to them for
    inpainting. An image that keeps its shape, in a bucket, takes as much at most.
    """
    if not isinstance(network_config(settings)[1], UNetConfig | DiTConfig):
        return None
    C, side = _latent_shape(settings, _vae_config(settings))
    variants = positive_int(settings, "crops", 1) * (2 if settings.get("flip", False) else 1)
    if not settings.get("masks"):
        return variants * 2 * 2 * C * side * side
    return variants * positive_int(settings, "masks") * 2 * (4 * C + 1) * side * side


def kept_state_bytes(settings: Mapping[str, Any], images: int | None) -> int:
    """Bytes of the text states that a run on so many images keeps, one caption each; at most."""
    if images is None or images > MAX_KEPT:
        return 0
    lora = lora_config(settings)
    is_denoiser = isinstance(network_config(settings)[1], UNetConfig | DiTConfig)
    if not is_denoiser or (lora is not None and lora.text_encoder):
        return 0
    text = _text_config(settings)
    return 4 * (images + 1) * (text.max_position_embeddings or 77) * text.hidden_size


def _latent_shape(settings: Mapping[str, Any], vae: VAEConfig) -> tuple[int, int]:
    """Channels and side of the latents."""
    size = positive_int(settings, "image_size")
    if size % vae.factor:
        raise ValueError(f"image_size={size} must be divisible by {vae.factor}, the VAE's factor")
    return vae.latent_channels, size // vae.factor


def _vae_config(settings: Mapping[str, Any]) -> VAEConfig:
    """The configuration of the frozen VAE; only config.json, or a header, is read."""
    vae, init = settings.get("vae"), settings.get("init")
    if vae is None and init is not None:
        return read_start(init).vae
    vae = vae or "emoji"
    if vae == SD15:
        return VAEConfig()
    if (path := to_be_made(vae)) is not None:
        _, config = network_config(read_yaml(path))
        assert isinstance(config, VAEConfig)
        return config
    return VAEConfig.from_dict(load_json(find_component(vae, "vae") / "config.json"))


def _text_config(settings: Mapping[str, Any]) -> CLIPTextConfig:
    """The configuration of the text encoder; only config.json, or a header, is read."""
    text, init = settings.get("text_encoder"), settings.get("init")
    if text is None and init is not None:
        return read_start(init).text
    text = text or "emoji"
    if text == SD15:
        return tower_config(SD15_TEXT)
    if (path := to_be_made(text)) is not None:
        settings = read_yaml(path)
        _, size = network_config(settings)
        assert isinstance(size, CLIPSize)
        vocab_size, max_tokens = (positive_int(settings, n) for n in ("vocab_size", "max_tokens"))
        return text_config(size, vocab_size=vocab_size, max_tokens=max_tokens)
    folder = find_component(text, "text_encoder") / "text_encoder"
    return tower_config(load_json(folder / "config.json"))


def _denoiser(
    settings: Mapping[str, Any], config: UNetConfig | DiTConfig, precision: str
) -> Workload:
    """A UNet's or DiT's training on cached latents, with its text encoder and VAE in memory; a
    student's with its teacher too."""
    vae, text, lora = _vae_config(settings), _text_config(settings), lora_config(settings)
    C, side = _latent_shape(settings, vae)
    config = _fitted(config, settings, C, side, text)
    more = config.in_channels - C  # mask and masked image
    diffusion = Diffusion("flow", "flow_prediction")  # all kinds compute the same sizes
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    frozen_dtype = torch.float32 if lora is None else half
    vae_dtype = torch.bfloat16 if frozen_dtype == torch.bfloat16 else torch.float32
    trains_text = lora is not None and lora.text_encoder
    distils = settings.get("teacher") is not None
    steps = positive_int(settings, "distilled_steps", Distill.distilled_steps)
    teacher_steps = positive_int(settings, "teacher_steps", Distill.teacher_steps)
    # A pass on fake tensors takes a second of a large network.
    left_out = 2 * (teacher_steps - steps) / steps if distils else 0.0

    def tower() -> nn.Module:
        with _default_dtype(frozen_dtype):
            return CLIPText(text)

    def network() -> nn.Module:
        with _default_dtype(frozen_dtype):
            network = DiT(config) if isinstance(config, DiTConfig) else UNet(config)
        if lora is None:
            return network
        assert isinstance(network, UNet)
        return with_lora(network, tower() if trains_text else nn.Module(), lora, seed=0)

    def frozen() -> list[nn.Module]:
        with _default_dtype(vae_dtype):
            networks: list[nn.Module] = [VAE(vae)]
            networks = networks if trains_text else [tower(), *networks]
        if distils:
            with _default_dtype(half):
                networks.append(DiT(config) if isinstance(config, DiTConfig) else UNet(config))
        return [network.requires_grad_(False).eval() for network in networks]

    def loss(model: Model, frozen: Sequence[Model], B: int) -> Tensor:
        def denoise(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            x = torch.cat([x, torch.zeros(B, more, side, side)], dim=1) if more else x
            output = model(x, t, context)
            return output[:, :C] if config.out_channels > C else output  # no learned variance

        posterior = Posterior.from_moments(torch.randn(B, 2 * C, side, side))
        x0 = posterior.sample(torch.randn(B, C, side, side))
        context = torch.zeros(B, text.max_position_embeddings or 77, dtype=torch.long)
        if not trains_text:
            with torch.no_grad():
                context = frozen[0](context)
        t = torch.rand(B) * diffusion.num_timesteps
        noise = torch.randn(B, C, side, side)
        if distils:
            return _student_loss(model, frozen[-1], noise, context, steps, half).mean()
        return diffusion.loss(denoise, x0, context, noise=noise, t=t).mean()

    return Workload(network, loss, frozen, left_out)


def _student_loss(
    student: Model,
    teacher: Model,
    noise: Tensor,
    context: Tensor,
    steps: int,
    dtype: torch.dtype,
) -> Tensor:
    """A student's loss (N, B), at N steps; its guided teacher, in `dtype`, has as many here."""

    def evaluated(x: Tensor, timestep: Tensor, both: Tensor) -> Tensor:
        return teacher(x.to(dtype), timestep, both.to(dtype)).to(x.dtype)

    flow = Diffusion("flow", "flow_prediction")
    guided = guided_denoiser(flow, evaluated, context, torch.zeros_like(context), 4.0)
    levels = flow.levels(steps)
    return step_errors(flow, student, trajectory(guided, noise, levels, steps), context, levels)


def _fitted(
    config: UNetConfig | DiTConfig,
    settings: Mapping[str, Any],
    C: int,
    side: int,
    text: CLIPTextConfig,
) -> UNetConfig | DiTConfig:
    """The denoiser's configuration beside this VAE and text encoder.

    Raises ValueError for a network of `init` that does not fit them.
    """
    width = text.hidden_size
    if isinstance(config, DiTConfig) and side % config.patch_size:
        raise ValueError(
            f"patch_size={config.patch_size} must divide {side}, the side of the latents"
        )
    in_channels = 2 * C + 1 if settings.get("inpainting") else C
    if settings.get("init") is None:
        return replace(
            config,
            in_channels=in_channels,
            out_channels=C,
            sample_size=side,
            cross_attention_dim=width,
        )
    for name, value, allowed, what in (
        ("in_channels", config.in_channels, (C, in_channels), "the VAE's latent_channels"),
        ("out_channels", config.out_channels, (C, 2 * C), "the VAE's latent_channels"),
        ("cross_attention_dim", config.cross_attention_dim, (width,), "the text encoder's width"),
    ):
        if value not in allowed:
            raise ValueError(
                f"{name}={value} of the network of init={settings['init']} must be {allowed[0]}, "
                f"{what}"
            )
    if settings.get("lora") is not None and config.in_channels != in_channels:
        raise ValueError(
            f"lora must be null: init={settings['init']} has no channels for masks, which a LoRA "
            "cannot add; take an inpainting model as init, or train all of this one"
        )
    return replace(config, in_channels=in_channels, sample_size=side)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks are made in this precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _vae(settings: Mapping[str, Any], config: VAEConfig) -> Workload:
    """A VAE's training on images, by reconstruction and KL alone."""
    for key, needed in (
        ("init", "left out for a plan, with the shapes of its network as vae"),
        ("decoder_only", "False for a plan: the full network is counted as trained"),
        ("perceptual_weight", "0 for a plan: what LPIPS needs is not counted"),
        ("disc_weight", "0 for a plan: what a discriminator needs is not counted"),
    ):
        if settings.get(key) not in (None, 0):
            raise ValueError(f"{key}={settings[key]!r} must be {needed}")
    size = positive_int(settings, "image_size")
    if size % config.factor:
        raise ValueError(f"image_size={size} must be divisible by {config.factor}")
    C, side = config.latent_channels, size // config.factor

    def loss(model: Model, frozen: Sequence[Model], B: int) -> Tensor:
        images = torch.rand(B, 3, size, size) * 2 - 1
        reconstruction, posterior = model(images, torch.randn(B, C, side, side))
        return vae_loss(reconstruction, images, posterior, norm="l1", kl_weight=1e-3)[0]

    return Workload(lambda: VAE(config), loss)


def _clip(settings: Mapping[str, Any], size: CLIPSize, *, processes: int, eager: bool) -> Workload:
    """A CLIP's training with the softmax loss; `eager`: attention by plain matrix products."""
    if settings.get("init") is not None:
        raise ValueError(
            f"init={settings['init']!r} must be left out for a plan, with the shapes of its towers "
            "as clip, vocab_size and max_tokens"
        )
    length, vocab_size = positive_int(settings, "max_tokens"), positive_int(settings, "vocab_size")
    side = positive_int(settings, "image_size")
    # A vocabulary of the right length; nothing is ever tokenised with it.
    tokens = ["<|startoftext|>", "<|endoftext|>", *(f"word{i}" for i in range(2, vocab_size))]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length
    )

    def model() -> nn.Module:
        towers = new_clip(size, tokenizer, image_size=side)
        if eager:  # as CLIPTask does on a CPU
            towers.set_attn_implementation("eager")
        return towers

    def loss(model: Model, frozen: Sequence[Model], B: int) -> Tensor:
        ids = torch.zeros(B, length, dtype=torch.long)
        output = model(input_ids=ids, pixel_values=torch.rand(B, 3, side, side))
        image, text = output.image_embeds.float(), output.text_embeds.float()
        targets = torch.arange(B)
        # Each process compares its local images and captions with the gathered ones (open_clip).
        all_images, all_texts = image.repeat(processes, 1), text.repeat(processes, 1)
        logits = (100 * image @ all_texts.T, 100 * text @ all_images.T)
        return (F.cross_entropy(logits[0], targets) + F.cross_entropy(logits[1], targets)) / 2

    return Workload(model, loss)
