"""`latentdiff convert`: a model from a folder to a single file and back, with LoRAs or as one."""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.cli import loras
from latentdiff.cli.generate import DTYPES

if TYPE_CHECKING:
    import torch


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "convert", help="a folder to a single file and back; LoRAs", allow_abbrev=False
    )
    parser.set_defaults(run=_convert, parser=parser)
    add = parser.add_argument
    add("source", metavar="IN", help="emoji, a folder, a .safetensors file or a hub id")
    add("out", metavar="OUT", type=Path, help="a new folder, or a file.safetensors to write")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--variant", help="such as fp16: which of the folder's weights")
    add("--dtype", choices=DTYPES, help="of the weights; default: as they are in IN")
    add("--config", help="of a single file: LDM's YAML file, or a diffusers folder like it")
    add("--tokenizer", help="of a single file: a folder or hub id; default: its own, or CLIP's")
    add(
        "--unsafe_pickle",
        action="store_true",
        help="open IN even if it is a .ckpt, .pt or .bin file, or a folder of them, which can "
        "attack this machine; only if you trust whoever made it",
    )
    loras.add_arguments(parser)


def _convert(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.exists():
        raise ValueError(f"OUT={out} is there already; give a new name")
    if out.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".yaml"):
        raise ValueError(f"OUT={out} must be a folder, or a file that ends in .safetensors")
    import torch

    from latentdiff.formats.diffusers import find_model

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    source = Path(arguments.source)
    if loras.writes_lora(arguments) and not arguments.lora_of:
        loras.rewrite(arguments, dtype)
        return
    if arguments.unsafe_pickle:
        from latentdiff.formats.pickle import convert_pickle, convert_pickled_folder

        as_it_is = not (arguments.lora or arguments.lora_of)
        if source.is_file() and out.suffix == ".safetensors" and as_it_is:  # with its own names
            convert_pickle(source, out, dtype=dtype)
            print(out)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".convert-") as folder:
            copy = Path(folder) / "model.safetensors" if source.is_file() else Path(folder)
            (convert_pickle if source.is_file() else convert_pickled_folder)(source, copy)
            _write(copy, arguments, dtype)
        return
    if not source.is_file():
        source = find_model(
            arguments.source, revision=arguments.revision, variant=arguments.variant
        )
    _write(source, arguments, dtype)


def _write(source: Path, arguments: argparse.Namespace, dtype: "torch.dtype | None") -> None:
    from latentdiff.pipeline import Pipeline

    if source.is_file():
        pipeline = Pipeline.from_single_file(
            source, config=arguments.config, tokenizer=arguments.tokenizer
        )
    else:
        pipeline = Pipeline.from_pretrained(source, variant=arguments.variant)
    if arguments.lora_of:
        loras.extract(pipeline, arguments, dtype)
        return
    if arguments.lora:
        loras.merge(pipeline, arguments.lora)
    dtype = _stored(source, arguments.variant) if dtype is None else dtype
    out: Path = arguments.out
    if out.suffix == ".safetensors":
        for sentence in pipeline.save_single_file(out, dtype=dtype):
            print(sentence)
    else:
        pipeline.save_pretrained(out, dtype=dtype)
    print(out)


def _stored(source: Path, variant: str | None) -> "torch.dtype":
    """The most frequent dtype of the denoiser's tensors, or of those in the single file."""
    from latentdiff.formats.diffusers import STEMS, check_pipeline_folder
    from latentdiff.formats.header import read_header
    from latentdiff.formats.sharded_weights import read_headers

    if source.is_file():
        headers = [read_header(source)]
    else:
        variants = check_pipeline_folder(source, variant=variant)
        denoiser = "unet" if "unet" in variants else "transformer"
        headers = read_headers(source / denoiser, STEMS["unet"], variants[denoiser])[1].values()
    counts = Counter(dtype for header in headers for dtype in header.dtypes.values())
    return max((dtype for dtype in counts if dtype.is_floating_point), key=lambda d: counts[d])
