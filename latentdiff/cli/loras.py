"""LoRAs on the command line: merged into a model, made of two models, resized and renamed."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from latentdiff.pipeline import Pipeline

NAMES = ("kohya", "diffusers")
DEFAULT_RANK = 16


def file_and_scale(text: str) -> tuple[Path, float]:
    """FILE, of scale 1, or FILE:SCALE; the file may be named by its run's `model/`.

    Raises ValueError if there is no such file.
    """
    from latentdiff.formats.diffusers import LORA

    name, _, scale = text.rpartition(":")
    try:
        factor = float(scale)
    except ValueError:
        name, factor = text, 1.0
    if not math.isfinite(factor):
        raise ValueError(f"--lora {text}: the scale {scale} must be a finite number")
    path = Path(name) / LORA if name and (Path(name) / LORA).is_file() else Path(name)
    if not name or not path.is_file():
        raise ValueError(f"--lora {text}: {name or text} is not a file")
    return path, factor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `latentdiff convert` does with LoRAs."""
    add = parser.add_argument_group("LoRAs").add_argument
    add(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="write it into the model's weights; may be given several times",
    )
    add("--lora_of", metavar="BASE", help="write the LoRA that makes the model IN of this one")
    add(
        "--lora_rank",
        type=int,
        metavar="RANK",
        help=f"of the LoRA that is written; default: {DEFAULT_RANK}, or that of the LoRA IN",
    )
    add("--lora_names", choices=NAMES, help="of the LoRA that is written; default: kohya")


def writes_lora(arguments: argparse.Namespace) -> bool:
    """Whether OUT is to be a LoRA. Raises ValueError for options that exclude each other."""
    from latentdiff.formats.lora import is_lora

    source = Path(arguments.source)
    from_lora = source.is_file() and is_lora(source)
    named = [n for n in ("lora_rank", "lora_names") if getattr(arguments, n) is not None]
    if from_lora and (arguments.lora or arguments.lora_of):
        option = "--lora" if arguments.lora else "--lora_of"
        raise ValueError(f"{option} is for a model, and IN={source} is a LoRA; IN is the model")
    if named and not (from_lora or arguments.lora_of):
        raise ValueError(
            f"--{named[0]} is of the LoRA that is written, and none is: IN={arguments.source} is "
            "no LoRA, and there is no --lora_of"
        )
    if arguments.lora_rank is not None and arguments.lora_rank < 1:
        raise ValueError(f"--lora_rank {arguments.lora_rank} must be at least 1")
    out: Path = arguments.out
    if (from_lora or arguments.lora_of) and out.suffix != ".safetensors":
        raise ValueError(f"OUT={out} is to be a LoRA, a file that ends in .safetensors")
    if from_lora:
        for name in ("config", "tokenizer", "ema", "unsafe_pickle"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} is for a model, and IN={source} is a LoRA")
    return from_lora or bool(arguments.lora_of)


def merge(pipeline: "Pipeline", loras: list[str]) -> None:
    """Write LoRAs, each FILE or FILE:SCALE, into a model's weights, which keep their precision."""
    networks = (pipeline.unet, pipeline.text_encoder.model)
    precisions = [[p.dtype for p in network.parameters()] for network in networks]
    for network in networks:  # sums in float32
        network.float()
    for i, text in enumerate(loras):
        path, scale = file_and_scale(text)
        pipeline.loras.load(path, name=f"{i}", scale=scale)
    pipeline.loras.fuse()
    for network, own in zip(networks, precisions, strict=True):
        for parameter, dtype in zip(network.parameters(), own, strict=True):
            parameter.data = parameter.data.to(dtype)


def rewrite(arguments: argparse.Namespace, dtype: "torch.dtype | None") -> None:
    """Write the LoRA IN with other names, ranks or precision."""
    from latentdiff.formats.header import read_header
    from latentdiff.formats.lora import LoRAFile, read_lora
    from latentdiff.formats.lora_writing import plain_layers, write_lora
    from latentdiff.models.low_rank import resized

    source, rank = Path(arguments.source), arguments.lora_rank
    file, header = read_lora(source, layers_per_block=2), read_header(source)
    parts = plain_layers(file, source)
    if rank is not None:
        file = LoRAFile(
            *({n: resized(one, rank) for n, one in part.items()} for part in parts.values()),
            distilled_steps=file.distilled_steps,
        )
    kept = {
        name: text
        for name, text in header.metadata.items()
        if name not in ("format", "lora_adapter_metadata", "ss_network_dim", "ss_network_alpha")
        and "hash" not in name
    }
    stored = dtype or next(d for d in header.dtypes.values() if d.is_floating_point)
    write_lora(
        file, arguments.out, names=arguments.lora_names or "kohya", dtype=stored, metadata=kept
    )
    print(arguments.out)


def extract(
    pipeline: "Pipeline", arguments: argparse.Namespace, dtype: "torch.dtype | None"
) -> None:
    """Write the LoRA that makes a model of the one that `--lora_of` names."""
    import torch

    from latentdiff.formats.lora import LoRAFile
    from latentdiff.formats.lora_writing import write_lora
    from latentdiff.models.low_rank import difference
    from latentdiff.pipeline import Pipeline

    base = Pipeline.from_pretrained(arguments.lora_of, dtype=None, device="cpu")
    rank = DEFAULT_RANK if arguments.lora_rank is None else arguments.lora_rank
    parts = {
        "UNet": difference(base.unet, pipeline.unet, rank),
        "text encoder": difference(base.text_encoder.model, pipeline.text_encoder.model, rank),
    }
    unet, text = (part.layers for part in parts.values())
    text = {name.removeprefix("text_model."): layer for name, layer in text.items()}
    steps = pipeline.diffusion.distilled_steps
    steps = None if steps == base.diffusion.distilled_steps else steps
    write_lora(
        LoRAFile(unet, text, steps),
        arguments.out,
        names=arguments.lora_names or "kohya",
        dtype=torch.float16 if dtype is None else dtype,
    )
    for title, part in parts.items():
        if part.layers:
            print(f"{title}: {len(part.layers)} layers; {part.left:.1%} of their change is left")
        if part.others:
            print(
                f"{title}: {len(part.others)} changed parameters are no part of a LoRA, "
                f"first {part.others[0]}"
            )
    print(arguments.out)
