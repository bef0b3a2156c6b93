"""An independent account of original Stable Diffusion checkpoints: names and shapes, by walking
through a network in the order in which CompVis/stable-diffusion builds it."""

import torch
from torch import Tensor

from latentdiff.models.unet import ATTENTION_BLOCKS, ATTENTION_UP_BLOCKS, UNetConfig
from latentdiff.models.vae import VAEConfig

Shapes = dict[str, tuple[int, ...]]


def convolution(name: str, i: int, o: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (o, i, size, size), f"{name}.bias": (o,)}


def linear(name: str, i: int, o: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (o, i)} | ({f"{name}.bias": (o,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def residual_block(name: str, i: int, o: int, time: int) -> Shapes:
    """openaimodel.py, ResBlock."""
    skip = convolution(f"{name}.skip_connection", i, o, 1) if i != o else {}
    return (
        norm(f"{name}.in_layers.0", i)
        | convolution(f"{name}.in_layers.2", i, o)
        | linear(f"{name}.emb_layers.1", time, o)
        | norm(f"{name}.out_layers.0", o)
        | convolution(f"{name}.out_layers.3", o, o)
        | skip
    )


def transformer(name: str, width: int, config: UNetConfig) -> Shapes:
    """attention.py, SpatialTransformer."""
    found = norm(f"{name}.norm", width)
    for side in ("proj_in", "proj_out"):
        found |= (
            linear(f"{name}.{side}", width, width)
            if config.use_linear_projection
            else convolution(f"{name}.{side}", width, width, 1)
        )
    for i in range(config.transformer_layers_per_block):
        block = f"{name}.transformer_blocks.{i}"
        for attention, context in (("attn1", width), ("attn2", config.cross_attention_dim)):
            for part, source in (("q", width), ("k", context), ("v", context)):
                found |= linear(f"{block}.{attention}.to_{part}", source, width, bias=False)
            found |= linear(f"{block}.{attention}.to_out.0", width, width)
        found |= linear(f"{block}.ff.net.0.proj", width, 8 * width)
        found |= linear(f"{block}.ff.net.2", 4 * width, width)
        for i_norm in (1, 2, 3):
            found |= norm(f"{block}.norm{i_norm}", width)
    return found


def ldm_unet(config: UNetConfig) -> Shapes:
    """openaimodel.py, UNetModel: three lists of blocks, each a list of layers, numbered from 0."""
    first, time = config.block_out_channels[0], 4 * config.block_out_channels[0]
    found = linear("time_embed.0", first, time) | linear("time_embed.2", time, time)
    found |= convolution("input_blocks.0.0", config.in_channels, first)
    block, width, widths = 1, first, [first]
    last = len(config.block_out_channels) - 1
    for level, out in enumerate(config.block_out_channels):
        for _ in range(config.layers_per_block):
            found |= residual_block(f"input_blocks.{block}.0", width, out, time)
            width = out
            if ATTENTION_BLOCKS[config.down_block_types[level]]:
                found |= transformer(f"input_blocks.{block}.1", width, config)
            widths.append(width)
            block += 1
        if level < last:
            found |= convolution(f"input_blocks.{block}.0.op", width, width)
            widths.append(width)
            block += 1
    if config.mid_block_type is not None:
        found |= residual_block("middle_block.0", width, width, time)
    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        found |= transformer("middle_block.1", width, config)
        found |= residual_block("middle_block.2", width, width, time)
    block = 0
    for level, out in enumerate(reversed(config.block_out_channels)):
        for i in range(config.layers_per_block + 1):
            layer = 1
            found |= residual_block(f"output_blocks.{block}.0", width + widths.pop(), out, time)
            width = out
            if ATTENTION_UP_BLOCKS[config.up_block_types[level]]:
                found |= transformer(f"output_blocks.{block}.1", width, config)
                layer = 2
            if i == config.layers_per_block and level < last:
                found |= convolution(f"output_blocks.{block}.{layer}.conv", width, width)
            block += 1
    return found | norm("out.0", first) | convolution("out.2", first, config.out_channels)


def ldm_vae(config: VAEConfig) -> Shapes:
    """model.py, Encoder and Decoder, and autoencoder.py, AutoencoderKL."""
    widths, latents = config.block_out_channels, config.latent_channels
    found: Shapes = {}

    def block(name: str, i: int, o: int) -> Shapes:
        skip = convolution(f"{name}.nin_shortcut", i, o, 1) if i != o else {}
        return (
            norm(f"{name}.norm1", i)
            | convolution(f"{name}.conv1", i, o)
            | norm(f"{name}.norm2", o)
            | convolution(f"{name}.conv2", o, o)
            | skip
        )

    def middle(half: str) -> Shapes:
        made = block(f"{half}.mid.block_1", widths[-1], widths[-1])
        made |= block(f"{half}.mid.block_2", widths[-1], widths[-1])
        if config.mid_block_add_attention:
            made |= norm(f"{half}.mid.attn_1.norm", widths[-1])
            for part in ("q", "k", "v", "proj_out"):
                made |= convolution(f"{half}.mid.attn_1.{part}", widths[-1], widths[-1], 1)
        return made

    found |= convolution("encoder.conv_in", config.in_channels, widths[0])
    width = widths[0]
    for level, out in enumerate(widths):
        for i in range(config.layers_per_block):
            found |= block(f"encoder.down.{level}.block.{i}", width, out)
            width = out
        if level < len(widths) - 1:
            found |= convolution(f"encoder.down.{level}.downsample.conv", width, width)
    found |= middle("encoder") | norm("encoder.norm_out", width)
    found |= convolution("encoder.conv_out", width, 2 * latents)
    found |= convolution("decoder.conv_in", latents, width) | middle("decoder")
    for level, out in reversed(list(enumerate(widths))):
        for i in range(config.layers_per_block + 1):
            found |= block(f"decoder.up.{level}.block.{i}", width, out)
            width = out
        if level > 0:
            found |= convolution(f"decoder.up.{level}.upsample.conv", width, width)
    found |= norm("decoder.norm_out", width)
    found |= convolution("decoder.conv_out", width, config.out_channels)
    if config.use_quant_conv:
        found |= convolution("quant_conv", 2 * latents, 2 * latents, 1)
    if config.use_post_quant_conv:
        found |= convolution("post_quant_conv", latents, latents, 1)
    return found


def clip_tower(width: int, layers: int, *, words: int = 30, places: int = 12) -> Shapes:
    """transformers' CLIPTextModel, whose names SD 1.x keeps."""
    found = {
        "text_model.embeddings.token_embedding.weight": (words, width),
        "text_model.embeddings.position_embedding.weight": (places, width),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            found |= linear(f"{layer}.self_attn.{part}_proj", width, width)
        found |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        found |= linear(f"{layer}.mlp.fc1", width, 4 * width)
        found |= linear(f"{layer}.mlp.fc2", 4 * width, width)
    return found | norm("text_model.final_layer_norm", width)


def open_clip_tower(width: int, layers: int, *, words: int = 30, places: int = 12) -> Shapes:
    """open_clip's CLIP without its image half, whose names SD 2.x keeps."""
    found: Shapes = {
        "token_embedding.weight": (words, width),
        "positional_embedding": (places, width),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        found |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
        }
        found |= linear(f"{block}.attn.out_proj", width, width)
        found |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        found |= linear(f"{block}.mlp.c_fc", width, 4 * width)
        found |= linear(f"{block}.mlp.c_proj", 4 * width, width)
    return found | norm("ln_final", width)


def checkpoint(
    unet: UNetConfig, vae: VAEConfig, *, open_clip: bool = False, layers: int = 2
) -> dict[str, Tensor]:
    """Random weights under the names of an original checkpoint; the tower is as wide as needed."""
    tower = open_clip_tower if open_clip else clip_tower
    prefix = "cond_stage_model.model." if open_clip else "cond_stage_model.transformer."
    named = {
        "model.diffusion_model.": ldm_unet(unet),
        "first_stage_model.": ldm_vae(vae),
        prefix: tower(unet.cross_attention_dim, layers),
    }
    generator = torch.Generator().manual_seed(0)
    return {
        start + name: torch.randn(shape, generator=generator)
        for start, shapes in named.items()
        for name, shape in shapes.items()
    }
