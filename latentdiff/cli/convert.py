"""`latentdiff convert`: a model from a folder to a single file and back, with LoRAs or as one."""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
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
    add("--ema", action="store_true", help="of a single file: the running averages of its UNet")
    add("--tokenizer", help="of a single file: a folder or hub id; default: its own, or CLIP's")
    add(
        "--unsafe_pickle",
        action="store_true",
        help="open IN even if it is a .ckpt, .pt or .bin file, or a folder of them, which can "
        "attack this machine; only if you trust whoever made it",
    )
    loras.add_arguments(parser)


_OF_A_FILE = ("config", "tokenizer", "ema")  # options that are for a single file alone
_OF_A_FOLDER = ("revision", "variant")
# Of a folder; all else, such as a licence or a safety checker, is not in OUT.
_READ = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "unet", "vae"}
# The card of a folder, and of a single file: beside it, where A1111 shows the preview.
_CARD = {"README.md": ".md", "preview.png": ".preview.png"}


def _convert(arguments: argparse.Namespace) -> None:
    source, out = Path(arguments.source), arguments.out
    _check_out(out)
    import torch

    from latentdiff.formats.diffusers import find_model

    _refuse(arguments, _OF_A_FOLDER if source.is_file() else _OF_A_FILE)
    writes_lora = loras.writes_lora(arguments)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    if writes_lora and not arguments.lora_of:
        loras.rewrite(arguments, dtype)
        return
    if arguments.unsafe_pickle:
        _convert_pickles(source, arguments, dtype)
        return
    if not source.is_file():
        source = find_model(
            arguments.source, revision=arguments.revision, variant=arguments.variant
        )
    _write(source, arguments, dtype)


def _check_out(out: Path) -> None:
    """Raise ValueError for a name that is taken, or that no model of ours has."""
    beside = [".yaml", *_CARD.values()] if out.suffix == ".safetensors" else []
    written = [out, *(out.with_suffix(suffix) for suffix in beside)]
    for path in written:
        if path.exists():
            raise ValueError(
                f"{'OUT=' if path == out else ''}{path} is there already; give a new name"
            )
    if out.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".yaml"):
        raise ValueError(f"OUT={out} must be a folder, or a file that ends in .safetensors")


def _refuse(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """Raise ValueError for an option that this IN does not have."""
    for name in options:
        if (value := getattr(arguments, name)) not in (None, False):
            said = "" if value is True else f" {value}"
            raise ValueError(f"--{name}{said} has no meaning for IN={arguments.source}")


def _convert_pickles(
    source: Path, arguments: argparse.Namespace, dtype: "torch.dtype | None"
) -> None:
    from latentdiff.formats.pickle import convert_pickle, convert_pickled_folder

    _refuse(arguments, ["revision"])
    out, config = arguments.out, source.with_suffix(".yaml")
    as_it_is = not (arguments.lora or arguments.lora_of)
    if source.is_file() and out.suffix == ".safetensors" and as_it_is:  # under their own names
        _refuse(arguments, _OF_A_FILE)
        convert_pickle(source, out, dtype=dtype)
        if config.is_file():  # of the same model: without it, nothing might say that it predicts v
            shutil.copyfile(config, out.with_suffix(".yaml"))
        print(out)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".convert-") as folder:
        copy = Path(folder)
        if source.is_dir():
            _name_left_out(source)
        elif source.is_file():
            copy /= source.with_suffix(".safetensors").name
            if config.is_file():
                shutil.copyfile(config, copy.with_suffix(".yaml"))
        (convert_pickle if source.is_file() else convert_pickled_folder)(source, copy)
        _write(copy, arguments, dtype)


def _write(source: Path, arguments: argparse.Namespace, dtype: "torch.dtype | None") -> None:
    """Read the model, each tensor in its own precision, and write it in the other form."""
    from latentdiff.pipeline import Pipeline

    metadata = None
    if source.is_file():
        metadata = _said_in(source, arguments)
        pipeline = Pipeline.from_single_file(
            source,
            config=arguments.config,
            tokenizer=arguments.tokenizer,
            ema=arguments.ema,
            dtype=None,
            device="cpu",
        )
    else:
        pipeline = Pipeline.from_pretrained(
            source, variant=arguments.variant, dtype=None, device="cpu"
        )
        _name_left_out(source)
    if arguments.lora_of:
        loras.extract(pipeline, arguments, dtype)
        return
    if arguments.lora:
        loras.merge(pipeline, arguments.lora)
    out: Path = arguments.out
    if out.suffix == ".safetensors":
        for sentence in pipeline.save_single_file(out, dtype=dtype, metadata=metadata):
            print(sentence)
        for name, suffix in _CARD.items():  # none is made of nothing
            if source.is_dir() and (source / name).is_file():
                shutil.copyfile(source / name, out.with_suffix(suffix))
                print(out.with_suffix(suffix))
    else:
        pipeline.save_pretrained(out, dtype=dtype)
        _write_card(source, arguments)
    print(out)


def _write_card(source: Path, arguments: argparse.Namespace) -> None:
    """Give a folder the model card of the folder or file that it was made of, or a short one."""
    from latentdiff.formats.model_card import front_matter, public_name, usage

    cards = {
        name: source.with_suffix(suffix) if source.is_file() else source / name
        for name, suffix in _CARD.items()
    }
    if cards["README.md"].is_file():
        for name, card in cards.items():
            if card.is_file():
                shutil.copyfile(card, arguments.out / name)
        return
    base = public_name(arguments.source)
    text = (
        f"{front_matter('pipeline', base_model=base)}# {arguments.out.name}\n\nConverted by "
        "`latentdiff convert`" + ("" if base is None else f" from {base}") + ".\n\n## Use\n\n"
    )
    (arguments.out / "README.md").write_text(text + usage("pipeline"), encoding="utf-8")


def _name_left_out(folder: Path) -> None:
    """Print what of a folder will not be in OUT."""
    if left := sorted({path.name for path in folder.iterdir()} - _READ - _CARD.keys()):
        print(f"Left out of what {folder.name} holds: {', '.join(left)}")


def _said_in(file: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """The metadata of a single file; prints what of the file will not be in OUT."""
    from latentdiff.formats.header import read_header
    from latentdiff.formats.ldm.modelspec import OUR_KEY, RENEWED
    from latentdiff.formats.single_file import EMA

    header = read_header(file)
    if not arguments.ema and any(name.startswith(EMA) for name in header.shapes):
        print(f"{file.name} holds running averages as well, which are left out; --ema takes them.")
    metadata = {
        key: value for key, value in header.metadata.items() if key not in (OUR_KEY, "format")
    }
    lost = sorted(metadata.keys() - RENEWED)
    if lost and arguments.out.suffix != ".safetensors":
        first = ", ".join(lost[:3]) + (" …" if len(lost) > 3 else "")
        print(f"A folder has no place for {len(lost)} entries of the file's metadata: {first}")
    return metadata
