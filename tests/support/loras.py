"""LoRA files as the trainers write them, of random numbers, for any network."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.pipeline import Pipeline

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
UNET = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj", "conv_in"]
UNET += ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
SOME = ["attn2.to_k", "conv1", "conv_in"]  # where one layer of a kind shows as much as all
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

Tensors = dict[str, Tensor]


def random_lora(network: nn.Module, names: list[str], *, rank: int, seed: int = 0) -> Tensors:
    """A LoRA for these kinds of layers, by peft's names; by halves, which every trainer writes."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(tuple(names)):
            out, channels, *kernel = module.weight.shape
            down = torch.randn((rank, channels, *kernel), generator=generator)
            up = torch.randn((out, rank, *(1 for _ in kernel)), generator=generator)
            found[f"{name}.lora_A.weight"] = (0.2 * down).half()
            found[f"{name}.lora_B.weight"] = (0.2 * up).half()
    return found


def in_peft_names(unet: Tensors, text_encoder: Tensors | None = None) -> Tensors:
    text = {} if text_encoder is None else text_encoder
    return {f"unet.{name}": tensor for name, tensor in unet.items()} | {
        f"text_encoder.text_model.{name}": tensor for name, tensor in text.items()
    }


def in_kohya_names(lora: Tensors, prefix: str, alphas: dict[str, float]) -> Tensors:
    """As sd-scripts names them; the layers in `alphas` get one (half precision, as it writes)."""
    found: Tensors = {}
    for name, tensor in lora.items():
        layer, _, kind = name.partition(".lora_")
        module = prefix + layer.replace(".", "_")
        found[f"{module}.lora_{'down' if kind == 'A.weight' else 'up'}.weight"] = tensor
        if layer in alphas:
            found[f"{module}.alpha"] = torch.tensor(alphas[layer]).half()
    return found


def kohya_file(path: Path, pipeline: Pipeline, *, alpha: float, names: list[str] = SOME) -> Path:
    """Write a LoRA for these layers of the UNet, and some of the text tower; returns `path`."""
    unet = random_lora(pipeline.unet, names, rank=4)
    text = random_lora(pipeline.text_encoder.model, TEXT[3:5], rank=4)
    alphas = {name.partition(".lora_")[0]: alpha for name in [*unet, *text]}
    tensors = in_kohya_names(unet, "lora_unet_", alphas)
    save_file(tensors | in_kohya_names(text, "lora_te_text_model_", alphas), path)
    return path


@torch.no_grad()
def outputs(unet: nn.Module, text_encoder: nn.Module) -> Tensor:
    """What the two networks compute in float64: text states, and noise from a UNet reading them."""
    unet.double().eval()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    text_encoder.double().eval()
    states = text_encoder(torch.arange(24).reshape(2, 12))
    context = getattr(states, "last_hidden_state", states)  # transformers' has a class for it
    noise = unet(x, torch.tensor([3, 700]), context)
    noise = noise if isinstance(noise, Tensor) else noise.sample
    return torch.cat([context.flatten(), noise.flatten()])


def ours(pipeline: Pipeline) -> Tensor:
    return outputs(pipeline.unet, pipeline.text_encoder.model)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
