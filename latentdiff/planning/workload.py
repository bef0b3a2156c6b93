"""Workloads: each network's training step, on images and captions that are made up.

Only shapes matter here. B examples of a micro-batch, C latent channels, H/W latent size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
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
from latentdiff.planning.footprint import Model, Workload
from latentdiff.planning.settings import network_config, positive_int
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


def make_workload(
    settings: Mapping[str, Any], *, processes: int = 1, gpu: bool = False
) -> Workload:
    """The training step of the network that the settings name.

    Raises ValueError, naming the key, for settings that are missing or do not fit together.
    """
    _, network = network_config(settings)
    if isinstance(network, UNetConfig | DiTConfig):
        return _denoiser(settings, network)
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


def _latent_shape(settings: Mapping[str, Any], vae: VAEConfig) -> tuple[int, int]:
    """Channels and side of the latents."""
    size = positive_int(settings, "image_size")
    if size % vae.factor:
        raise ValueError(f"image_size={size} must be divisible by {vae.factor}, the VAE's factor")
    return vae.latent_channels, size // vae.factor


def _vae_config(settings: Mapping[str, Any]) -> VAEConfig:
    """The configuration of the frozen VAE; only config.json is read."""
    vae = settings.get("vae") or "emoji"
    if vae == SD15:
        return VAEConfig()
    return VAEConfig.from_dict(load_json(find_component(vae, "vae") / "config.json"))


def _text_config(settings: Mapping[str, Any]) -> CLIPTextConfig:
    """The configuration of the frozen text encoder; only config.json is read."""
    text = settings.get("text_encoder") or "emoji"
    if text == SD15:
        return tower_config(_SD15_TEXT)
    folder = find_component(text, "text_encoder") / "text_encoder"
    return tower_config(load_json(folder / "config.json"))


def _denoiser(settings: Mapping[str, Any], config: UNetConfig | DiTConfig) -> Workload:
    """A UNet's or DiT's training on cached latents, with its text encoder and VAE in memory."""
    vae, text = _vae_config(settings), _text_config(settings)
    C, side = _latent_shape(settings, vae)
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

    def network() -> nn.Module:
        return DiT(config) if isinstance(config, DiTConfig) else UNet(config)

    def frozen() -> list[nn.Module]:
        return [net.requires_grad_(False).eval() for net in (CLIPTextModel(text), VAE(vae))]

    def loss(model: Model, frozen: Sequence[Model], B: int) -> Tensor:
        posterior = Posterior.from_moments(torch.randn(B, 2 * C, side, side))
        x0 = posterior.sample(torch.randn(B, C, side, side))
        with torch.no_grad():
            ids = torch.zeros(B, text.max_position_embeddings or 77, dtype=torch.long)
            context = frozen[0](input_ids=ids).last_hidden_state
        t = torch.rand(B) * diffusion.num_timesteps
        noise = torch.randn(B, C, side, side)
        return diffusion.loss(model, x0, context, noise=noise, t=t).mean()

    return Workload(network, loss, frozen)


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
