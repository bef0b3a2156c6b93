"""The initial networks of a denoiser's training: those of `init`, or a new denoiser."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from latentdiff.data.cache import LatentCache
from latentdiff.diffusion import Diffusion
from latentdiff.loading import Components, check_shapes
from latentdiff.models.dit import DiT
from latentdiff.models.fingerprint import encoder_fingerprint
from latentdiff.models.inpainting import with_mask_channels
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE
from latentdiff.pipeline import Pipeline
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.tasks.frozen import frozen_component

Say = Callable[[str], object]

NEW = Diffusion("flow", "flow_prediction")
"""Of a network that is not from `init`, unless another is given."""
HIGH_RATE = 3e-4
"""A learning rate above this is said where the whole network of `init` is trained."""


def load_init(config: TrainUNet, say: Say) -> Components | None:
    """The model that `init` names, in float32; None without one.

    For inpainting its network has the channels that it needs. Raises ValueError where there is no
    such model, where a LoRA is asked of a DiT, and where the network is for inpainting and the run
    is not, or has no channels for it and a LoRA is asked.
    """
    if config.init is None:
        return None
    try:
        init = Pipeline.from_pretrained(config.init, device="cpu").components
    except ValueError as error:
        raise ValueError(f"init: {error}") from error
    network, diffusion = init.unet, init.diffusion
    kind, count = type(network).__name__, sum(p.numel() for p in network.parameters())
    if diffusion.distilled_steps is not None:
        raise ValueError(
            f"init={config.init} is a student of distill.py, whose few steps a denoiser's loss "
            "would undo: train its teacher, and distil that"
        )
    if config.lora is not None and not isinstance(network, UNet):
        raise ValueError(f"lora needs a UNet, and init={config.init} has a {kind}: leave lora out")
    say(
        f"init: {config.init}, a {kind} of {count / 1e6:,.1f} M parameters, "
        f"prediction={diffusion.prediction}, schedule={diffusion.schedule}"
    )
    _fit_inpainting(config, init, say)
    rate = config.optimizer.learning_rate
    if config.lora is None and rate > HIGH_RATE:
        say(
            f"learning_rate={rate:g} is that of a new network, and may undo what init has learned: "
            "1e-5 to 1e-4 is usual"
        )
    return init


def start_vae(
    config: TrainUNet, init: Components | None, data: str | None, say: Say
) -> tuple[VAE, Path | None]:
    """The VAE that is given and its folder, or else that of `init`, which has no folder of its own;
    without both, see `frozen_component`.

    Another latent space than that of `init` is said, and refused with a LoRA, which could not
    teach it to the network.
    """
    if init is None or config.vae is not None:
        folder = frozen_component("vae", config.vae, data=data, say=say)
        vae = VAE.from_pretrained(folder)
        if init is not None:
            _compare_latents(config, init.vae, vae, say)
        return vae, folder
    return init.vae, None


def start_text_encoder(
    config: TrainUNet, init: Components | None, data: str | None, say: Say
) -> TextEncoder:
    """The text encoder that is given, or else that of `init`, or `frozen_component`'s."""
    if init is None or config.text_encoder is not None:
        folder = frozen_component("text_encoder", config.text_encoder, data=data, say=say)
        return TextEncoder.from_pretrained(folder)
    return init.text_encoder


def make_start(
    config: TrainUNet,
    init: Components | None,
    *,
    cache: LatentCache,
    vae: VAE,
    text_encoder: TextEncoder,
    say: Say,
) -> Components:
    """What is trained, with what it is trained beside.

    Raises ValueError where the network of `init` does not fit the VAE, the text encoder or the
    diffusion, and for an option of the loss that does not apply to the diffusion.
    """
    diffusion = config.diffusion or (NEW if init is None else init.diffusion)
    config.loss.check(diffusion)
    if init is None:
        network = new_denoiser(config, diffusion, cache=cache, vae=vae, text_encoder=text_encoder)
    else:
        network: Any = init.unet
        side = cache.image_size // vae.config.factor  # what is drawn by default from now on
        network.config = replace(network.config, sample_size=side)
        if changes := _differences(init.diffusion, diffusion):
            say(f"the diffusion is not that of init, which the network has to unlearn: {changes}")
    check_shapes(network, vae, text_encoder, diffusion)
    return Components(network, vae, text_encoder, diffusion)


def new_denoiser(
    config: TrainUNet,
    diffusion: Diffusion,
    *,
    cache: LatentCache,
    vae: VAE,
    text_encoder: TextEncoder,
) -> UNet | DiT:
    """The untrained network, whose channels and sizes fit the VAE, text encoder and cache."""
    channels = vae.config.latent_channels
    network = replace(
        config.unet if config.dit is None else config.dit,
        in_channels=2 * channels + 1 if config.inpainting else channels,
        out_channels=2 * channels if diffusion.learned_variance else channels,
        sample_size=cache.image_size // vae.config.factor,
        cross_attention_dim=text_encoder.width,
    )
    torch.manual_seed(config.loop.seed)
    return UNet(network) if isinstance(network, UNetConfig) else DiT(network)


def _fit_inpainting(config: TrainUNet, init: Components, say: Say) -> None:
    """Give the network of `init` the channels that inpainting needs."""
    channels, given = init.vae.config.latent_channels, init.unet.config.in_channels
    if not config.inpainting:
        if given == 2 * channels + 1:
            raise ValueError(
                f"init={config.init} is an inpainting model: inpainting must be true, with a mask "
                "for each image"
            )
        return
    if config.lora is not None and given == channels:
        raise ValueError(
            f"lora must be null: init={config.init} has no channels for mask and masked image, and "
            "a LoRA cannot add them; take an inpainting model as init, or train all of this one"
        )
    with_mask_channels(init.unet, channels)
    if given == channels:
        say(
            f"inpainting: the network gets {channels + 1} more input channels, for the mask and "
            "the masked image, whose weights are 0 at first"
        )


def _compare_latents(config: TrainUNet, own: VAE, given: VAE, say: Say) -> None:
    channels, others = own.config.latent_channels, given.config.latent_channels
    if channels != others or own.config.factor != given.config.factor:
        raise ValueError(
            f"vae={config.vae} has {others} channels and the factor {given.config.factor}, and the "
            f"VAE of init={config.init} has {channels} and {own.config.factor}: leave vae out"
        )
    if encoder_fingerprint(own) != encoder_fingerprint(given):
        if config.lora is not None:
            raise ValueError(
                f"vae={config.vae} makes other latents than the VAE of init={config.init}, which a "
                "LoRA cannot teach: leave vae out"
            )
        say(
            f"vae={config.vae} makes other latents than the VAE of init={config.init}: the network "
            "has to learn them anew"
        )


def _differences(before: Diffusion, after: Diffusion) -> str:
    """In words, the options of the diffusion that differ."""
    old, new = asdict(before), asdict(after)
    return ", ".join(
        f"{name} was {old[name]} and is {new[name]}" for name in old if old[name] != new[name]
    )
