"""Which weight of which layer a tensor of a LoRA file is, by any of the names in use.

Namings of the same tensors: peft's (`base_model.model.….to_q.lora_A.weight`, in diffusers' files
`unet.….to_q.lora_A.weight`), diffusers' two older ones (`….to_q.lora.down.weight`,
`….processor.to_q_lora.down.weight`), kohya's (`lora_unet_…_to_q.lora_down.weight`), that of LyCORIS
without kohya's scripts (`lycoris_…_to_q.…`) and ComfyUI's
(`diffusion_model.….to_q.lora_down.weight`). diffusers' own functions translate the older ones and
kohya's into peft's. The weights of LoHa, LoKr and DoRA have the same names after every layer's.
"""

import re
from types import SimpleNamespace

from latentdiff.formats.ldm.keys import TEXT_MODEL

Layer = tuple[str, str]
"""Component and layer, for example ("unet", "conv_in")."""

COMPONENTS = ("unet", "text_encoder")
SDXL = ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")

_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_")
_LYCORIS = "lycoris_"  # kohya's `lora_unet_`, of a network that was given to LyCORIS itself
_KOHYA_KINDS = {"lora_down.weight": "down", "lora_up.weight": "up"}
_PEFT_KINDS = {"lora_A.weight": "down", "lora_B.weight": "up"}
_OTHER_KINDS = r"alpha|dora_scale|lora_magnitude_vector"
_OTHER_KINDS += r"|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2"

# What peft, torch.compile and DDP put before a network's names, and peft, an adapter's, into them.
_WRAPPERS = re.compile(r"(unet\.|text_encoder\.)?((base_model\.model|_orig_mod|module)\.)+")
_ADAPTER = re.compile(
    r"(?<=\.lora_[AB])\.\w+(?=\.weight$)|(?<=\.lora_magnitude_vector)\.\w+\.weight$"
)
_COMFYUI_UNET = re.compile(
    rf"(?:model\.)?diffusion_model\.(.+)\.(lora_[A-Za-z]+\.weight|{_OTHER_KINDS})"
)
_COMFYUI_TEXT = re.compile(r"text_encoders\.clip_[lh]\.transformer\.")
_TEXT_TOWER = (TEXT_MODEL, "encoder.layers.")  # no UNet has such names


def is_pefts_own(name: str) -> bool:
    """Whether peft itself wrote a weight by this name; its alpha is then in another file."""
    return "base_model.model." in name or _ADAPTER.search(name) is not None


def parse_name(name: str, layers_per_block: int) -> tuple[Layer, str] | None:
    """Layer and kind of a tensor, or None if it is none of a LoRA's.

    The kind is `down`, `up`, `alpha` or, of LoHa, LoKr and DoRA, the name's own end.
    layers_per_block: the UNet's, for LDM's names.
    """
    name = _ADAPTER.sub("", _WRAPPERS.sub(r"\1", name, count=1))
    if name.startswith(_LYCORIS):
        name = f"lora_unet_{name.removeprefix(_LYCORIS)}"
    if name.startswith(_KOHYA):
        return _from_kohya(name, layers_per_block)
    if match := _COMFYUI_UNET.fullmatch(name):  # by the names of LDM's layers, or diffusers'
        kind = match[2].replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        return _from_kohya(f"lora_unet_{match[1].replace('.', '_')}.{kind}", layers_per_block)
    name = _COMFYUI_TEXT.sub("text_encoder.", name)
    if name.startswith(_TEXT_TOWER):
        name = f"text_encoder.{name}"
    return _from_peft(name)


def _from_kohya(name: str, layers_per_block: int) -> tuple[Layer, str] | None:
    """`parse_name` of kohya's names.

    Each name is translated on its own: given several, diffusers takes input_blocks_1 for the start
    of input_blocks_10, and ignores LDM's names beside its own.
    """
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    layer, _, kind = name.partition(".")
    if kind not in _KOHYA_KINDS and not re.fullmatch(_OTHER_KINDS, kind):
        return None
    pair = {f"{layer}.lora_down.weight": None, f"{layer}.lora_up.weight": None}
    config = SimpleNamespace(layers_per_block=layers_per_block)
    try:
        pair = _maybe_map_sgm_blocks_to_diffusers(pair, config)
        pair, _ = _convert_non_diffusers_lora_to_diffusers(pair)
    except (ValueError, IndexError, KeyError):  # blocks that are not numbered as LDM's are
        return None
    parsed = _from_peft(next(iter(pair)))
    if parsed is None:
        return None
    # diffusers takes LDM's upsampling layer for an attention, which has no `conv`.
    translated = re.sub(r"attentions\.\d+\.conv$", "upsamplers.0.conv", parsed[0][1])
    return (parsed[0][0], translated), _KOHYA_KINDS.get(kind, kind)


def _from_peft(name: str) -> tuple[Layer, str] | None:
    """`parse_name` of peft's or diffusers' names."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    layer, _, kind = name.rpartition(".")
    if re.fullmatch(_OTHER_KINDS, kind):  # as kohya's, though the layer is named otherwise
        parsed = _from_peft(f"{layer}.lora_A.weight")
        return None if parsed is None else (parsed[0], kind)
    name = name.replace(".lora_down.weight", ".lora_A.weight")
    name = name.replace(".lora_up.weight", ".lora_B.weight")
    component = next(
        (component for component in COMPONENTS if name.startswith(f"{component}.")), None
    )
    if component == "text_encoder":
        # This type's table holds that of the newer one too.
        renamed = convert_state_dict_to_peft(
            {name.removeprefix("text_encoder."): None}, original_type=StateDictType.DIFFUSERS_OLD
        )
    else:  # the first files, of UNets alone, have no prefix
        renamed = convert_unet_state_dict_to_peft({name.removeprefix("unet."): None})
    match = re.fullmatch(r"(.+)\.(lora_[AB]\.weight)", next(iter(renamed)).removeprefix(TEXT_MODEL))
    if match is None:
        return None
    return (component if component is not None else "unet", match[1]), _PEFT_KINDS[match[2]]
