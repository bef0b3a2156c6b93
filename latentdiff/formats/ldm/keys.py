"""Translate tensor names between original Stable Diffusion checkpoints (LDM) and diffusers.

The number of levels and layers and the blocks that attend are read off the names, at any depth.
LDM's names are those of CompVis/stable-diffusion: ldm/modules/diffusionmodules/openaimodel.py and
model.py. Names here are without the prefix of the network that they belong to.
"""

import re
from collections.abc import Iterable, Mapping

from latentdiff.formats.header import short_repr

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."  # SD 1.x: transformers' CLIPTextModel
OPEN_CLIP = "cond_stage_model.model."  # SD 2.x: the text half of an open_clip model

TEXT_MODEL = "text_model."  # begins the names of every published CLIPTextModel

MAX_BLOCKS = 100  # in one list of LDM's; SD has 12
_MAX_DEPTH = 7  # one more than the longest module name has

_CLIP_NAME = re.compile(
    r"text_model\.(embeddings\.(token|position)_embedding\.weight"
    r"|(encoder\.layers\.\d{1,4}\.(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
    r"|final_layer_norm)\.(weight|bias))"
)
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
# Between attention and residual blocks of the pixels, (C, C) or (C, C, 1, 1).
_VAE_LINEAR = tuple(
    f".mid_block.attentions.0.{part}" for part in _VAE_ATTENTION if part != "group_norm"
)


def unet_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """LDM's name of every tensor of a UNet2DConditionModel; ValueError for any other name."""
    names = set(names)
    levels = count(names, "down_blocks.")
    attends = [has(names, f"up_blocks.{i}.attentions.") for i in range(levels)]
    return _rename(names, _unet_modules(count(names, "down_blocks.0.resnets."), attends))


def unet_from_ldm(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name of every tensor of an LDM UNet; ValueError for an unknown name."""
    names = set(names)
    blocks = _check_count(count(names, "input_blocks."))
    ends = [i for i in range(blocks) if has(names, f"input_blocks.{i}.0.op.")]
    layers = (ends[0] if ends else blocks) - 1  # without the first convolution
    last = [(i + 1) * (layers + 1) - 1 for i in range(len(ends) + 1)]  # of each level's way up
    attends = [has(names, f"output_blocks.{i}.1.norm.") for i in last]
    return _rename(names, _swap(_unet_modules(layers, attends)))


def vae_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """LDM's name of every tensor of an AutoencoderKL; ValueError for any other name."""
    names = set(names)
    levels = count(names, "encoder.down_blocks.")
    return _rename(names, _vae_modules(levels, count(names, "encoder.down_blocks.0.resnets.")))


def vae_from_ldm(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name of every tensor of an LDM VAE; ValueError for an unknown name.

    Its depth is read off the decoder, as there are files without an encoder.
    """
    names = set(names)
    levels = _check_count(count(names, "decoder.up."))
    layers = _check_count(count(names, "decoder.up.0.block.") - 1)
    modules = _swap(_vae_modules(levels, layers))
    # diffusers' script that converts to LDM's names knew the attention's from before 0.17 alone,
    # and left newer ones as they are.
    for half in ("encoder", "decoder"):
        for part in _VAE_ATTENTION:
            modules[f"{half}.mid.attn_1.{part}"] = f"{half}.mid_block.attentions.0.{part}"
    return _rename(names, modules)


def is_vae_convolution(name: str) -> bool:
    """Whether a tensor, by diffusers' name, is a matrix that LDM writes as a 1×1 convolution."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.endswith(_VAE_LINEAR)


def clip_from_ldm(names: Iterable[str]) -> dict[str, str]:
    """Add the prefix `text_model.`, which some files leave out, to names of SD 1.x text towers.

    Raises ValueError for a name that no CLIPTextModel has.
    """
    renamed = {name: TEXT_MODEL + name.removeprefix(TEXT_MODEL) for name in names}
    for name in sorted(renamed):
        if not _CLIP_NAME.fullmatch(renamed[name]):
            raise _unknown(name)
    return renamed


def count(names: Iterable[str], prefix: str) -> int:
    """How many of prefix0, prefix1, … begin a name, up to the first that does not."""
    indices = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    number = 0
    while str(number) in indices:
        number += 1
    return number


def has(names: Iterable[str], prefix: str) -> bool:
    """Whether a name begins with `prefix`."""
    return any(name.startswith(prefix) for name in names)


def _unet_modules(layers: int, attends: list[bool]) -> dict[str, str]:
    """LDM's name of every module that a UNet can have, by diffusers' name.

    LDM numbers all blocks in sequence: the first convolution, then the layers of each level (0 is
    the residual block, 1 the transformer) and its resampling. attends: whether each level of the
    way up has transformers, because its upsampling is numbered after them.
    """
    levels, stride = len(attends), layers + 1
    modules = dict(_UNET_ENDS)

    def layer(block: str, i: int, ldm_block: str) -> None:
        for part, name in _UNET_RESNET.items():
            modules[f"{block}.resnets.{i}.{part}"] = f"{ldm_block}.0.{name}"
        modules[f"{block}.attentions.{i}"] = f"{ldm_block}.1"

    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for i in range(layers):
            layer(down, i, f"input_blocks.{1 + level * stride + i}")
        for i in range(stride):
            layer(up, i, f"output_blocks.{level * stride + i}")
        if level < levels - 1:
            modules[f"{down}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * stride}.0.op"
            last = f"output_blocks.{level * stride + layers}"
            modules[f"{up}.upsamplers.0.conv"] = f"{last}.{2 if attends[level] else 1}.conv"
    for part, name in _UNET_RESNET.items():
        for i in (0, 1):
            modules[f"mid_block.resnets.{i}.{part}"] = f"middle_block.{2 * i}.{name}"
    modules["mid_block.attentions.0"] = "middle_block.1"
    return modules


def _vae_modules(levels: int, layers: int) -> dict[str, str]:
    """LDM's name of every module that a VAE can have, by diffusers' name.

    LDM counts the decoder's levels from the full size, against the order of computation.
    """
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for part, name in _VAE_RESNET.items():
            for i in (0, 1):
                modules[f"{half}.mid_block.resnets.{i}.{part}"] = f"{half}.mid.block_{i + 1}.{name}"
        for part, name in _VAE_ATTENTION.items():
            modules[f"{half}.mid_block.attentions.0.{part}"] = f"{half}.mid.attn_1.{name}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        ldm_down, ldm_up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for part, name in _VAE_RESNET.items():
            for i in range(layers + 1):
                modules[f"{down}.resnets.{i}.{part}"] = f"{ldm_down}.block.{i}.{name}"
                modules[f"{up}.resnets.{i}.{part}"] = f"{ldm_up}.block.{i}.{name}"
        modules[f"{down}.downsamplers.0.conv"] = f"{ldm_down}.downsample.conv"
        modules[f"{up}.upsamplers.0.conv"] = f"{ldm_up}.upsample.conv"
    return modules


def _check_count(number: int) -> int:
    """Return `number`; ValueError if no network has as many blocks, before they take time."""
    if number > MAX_BLOCKS:
        raise ValueError(f"it has more than {MAX_BLOCKS} blocks in a row")
    return number


def _unknown(name: str) -> ValueError:
    return ValueError(f"{short_repr(name)} is no tensor of Stable Diffusion 1.x or 2.x")


def _swap(modules: Mapping[str, str]) -> dict[str, str]:
    return {ldm_name: name for name, ldm_name in modules.items()}


def _rename(names: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Rename the module that each name begins with; ValueError for a name with no known module."""
    renamed = {}
    for name in sorted(names):
        parts = name.split(".", _MAX_DEPTH)
        for n in range(len(parts) - 1, 0, -1):
            module = modules.get(".".join(parts[:n]))
            if module is not None:
                renamed[name] = ".".join([module, *parts[n:]])
                break
        else:
            raise _unknown(name)
    return renamed
