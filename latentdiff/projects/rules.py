"""The configurations of a project: sizes of networks and numbers of steps, by the number of images.

docs/own.md has the rules in a table, and which runs of this repository they come from.
"""

from collections.abc import Mapping
from typing import Any

from latentdiff.projects.look import Look

EPOCHS = {"vae": 20, "clip": 40, "unet": 250}
"""How often each image is seen, within the bounds of STEPS."""
STEPS = {"vae": (2000, 6000), "clip": (200, 3000), "unet": (3000, 40_000)}
"""The least: below it a VAE's colours and a UNet's shapes have not settled, however few images
there are. The most: beyond it more steps showed little."""
LATENT_CHANNELS = 16
FEW = 1000  # images, for which the UNet is half as wide
IN_MEMORY = 2_000_000_000  # bytes of decoded images that a GPU holds
COMMENT = {
    "vae": "Autoencoder: images to latents and back. It never reads a caption.",
    "clip": "Tokenizer and text encoder: captions to vectors, learned on pairs with the images.",
    "cache": "Latent cache: every image as latents, once, with its captions.",
    "unet": "UNet: noise and vectors to latents, by rectified flow, trained on the cache.",
}


def configurations(look: Look, *, gpu: bool) -> dict[str, dict[str, Any]]:
    """The options of each module that differ from its defaults; paths are relative to the project.

    Those of data are absolute or a hub id, as `look` has them.
    """
    size, num_images = look.config.image_size, look.num_images
    data = _data(look)
    speed = {"num_workers": 4} if gpu else {}
    if gpu and 3 * size * size * num_images < IN_MEMORY:
        speed = {"in_memory": True}
    clip_size = min(size, 64)
    max_tokens = min(77, max(16, -(-look.tokens // 8) * 8))
    # Captions are those of the data: the VAE reads none, the UNet takes the cache's.
    captions = {"caption_columns": list(look.config.caption_columns)}
    return {
        "vae": {
            **{"output_dir": "vae", **data, "image_size": size, "vae": _vae(size)},
            **{"kl_weight": 3e-4, "optimizer": "muon"},
            **_run("vae", num_images, batch_size=_batch_size(num_images, most=32)),
            **speed,
        },
        "clip": {
            **{"output_dir": "clip", **data, **captions, "image_size": clip_size},
            **{
                "vocab_size": 4096 if num_images >= FEW else 2048,
                "max_tokens": max_tokens,
            },
            **({"clip": {"patch_size": 4}} if clip_size < 64 else {}),
            **_run("clip", num_images, batch_size=_batch_size(num_images // 2, most=256)),
            **speed,
        },
        "cache": {
            **{"output_dir": "cache", **data, **captions, "image_size": size},
            **{"vae": "vae/model"},
        },
        "unet": {
            **{"output_dir": "unet", "cache": "cache", "vae": "vae/model"},
            **{"text_encoder": "clip/model", "unet": _unet(size, num_images)},
            "diffusion": {"schedule": "flow", "prediction": "flow_prediction"},
            **{"timestep_distribution": "logit_normal", "stratified": True},
            **_run("unet", num_images, batch_size=_batch_size(num_images, most=256 if gpu else 64)),
            **speed,
        },
    }


def _data(look: Look) -> dict[str, Any]:
    """The options of data that all the modules but the UNet have."""
    config = look.config
    options: dict[str, Any] = {"data": config.data}
    if look.summary.bad:
        options["bad_samples"] = "check/bad_samples.jsonl"
    for name, default in (("max_bad", 0.01), ("upscale_limit", 1.0)):
        if getattr(config, name) != default:
            options[name] = getattr(config, name)
    return options


def _run(module: str, num_images: int, *, batch_size: int) -> dict[str, Any]:
    """How long a module is trained, and how often it saves and shows what it does."""
    least, most = STEPS[module]
    steps = min(most, max(least, round(EPOCHS[module] * num_images / batch_size)))
    return {
        "batch_size": batch_size,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "warmup_steps": min(100, steps // 10),
        "cooldown_steps": 2 * steps // 5,
        "ema_decay": round(1 - 10 / steps, 4),  # over a tenth of the run
        "checkpoint_every": steps // 10,
        "preview_every": steps // 10,
        **({} if module == "vae" else {"validate_every": steps // 10}),
    }


def _batch_size(num_images: int, *, most: int) -> int:
    """The largest power of two up to `most` that half of the images fill."""
    size = 2
    while 2 * size <= min(most, num_images // 2):
        size *= 2
    return size


def _vae(image_size: int) -> Mapping[str, Any]:
    """Latents of an eighth of the side; of a quarter where that would be fewer than 8 x 8."""
    channels = [32, 64, 128] if image_size < 64 else [32, 32, 96, 192]
    return {
        "block_out_channels": channels,
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 16,
        "mid_block_add_attention": False,
    }


def _unet(image_size: int, num_images: int) -> Mapping[str, Any]:
    """Two resolutions for latents of 8 x 8, three for more; attention in all but 32 x 32."""
    side = image_size // (4 if image_size < 64 else 8)
    width = 64 if num_images < FEW else 128
    levels = 2 if side <= 8 else 3
    attends = [side // 2**level <= 16 for level in range(levels)]
    down = ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends]
    up = ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)]
    channels = [width * 2**level for level in range(levels)]
    return {
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "attention_head_dim": [channel // 64 for channel in channels],
        "use_linear_projection": True,
    }
