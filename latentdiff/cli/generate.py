"""The arguments of `latentdiff generate`; drawing.py does the work."""

import argparse
import functools
import sys
from pathlib import Path

from latentdiff.cli.help import Help
from latentdiff.cli.reading import say_reading
from latentdiff.engines import ENGINES
from latentdiff.formats.prompts import read_prompts

DTYPES = ("float32", "float16", "bfloat16")
SAMPLERS = (  # of latentdiff.samplers, which takes seconds to import
    *("ddim", "ddpm", "euler", "euler_ancestral", "heun", "lms", "pndm"),
    *("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "lcm"),
)
FIRST = (
    *("prompt", "model", "out", "steps", "guidance_scale", "sampler", "negative_prompt"),
    *("num_images", "seed", "image"),
)
EXAMPLES = """examples:
  latentdiff generate "a red heart"
  latentdiff generate --model runs/mine/unet/model --num_images 4 --seed 7 "a cat" "a dog"
  latentdiff generate --image photo.png --strength 0.6 "a cat in the snow\""""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments.

    Options of the pipeline have no default here: only those that are given are passed on, so that
    the defaults are the pipeline's, or the record's of the image that is drawn again.
    """
    parser = commands.add_parser(
        "generate",
        help="draw images",
        usage="%(prog)s [options] PROMPT [PROMPT ...]",
        epilog=EXAMPLES,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=32
        ),
    )
    parser.set_defaults(run=_generate, parser=parser)
    add = parser.add_argument
    add("-h", "--help", action=Help, first=FIRST)
    add("prompt", nargs="*", metavar="PROMPT", help='such as "a cat" "a dog"')
    add("--prompts", type=Path, metavar="FILE", default=None, help="more prompts, one a line")
    add = parser.add_argument_group("model: what to draw with, and where to").add_argument
    add("--model", help="emoji (the default), a folder, a .safetensors file or a hub id")
    add("--revision", default=None, help="branch, tag or commit of a hub id")
    add("--variant", default=None, help="such as fp16: which of the folder's weights")
    add("--tokenizer", default=None, help="folder or hub id, of a single file that has none")
    add("--dtype", choices=(*DTYPES, "auto"), help="what to compute in; default: float32")
    add("--device", default=None, help="such as cpu or cuda; default: an accelerator if any")
    add("--engine", choices=ENGINES, help="what computes; openvino is for CPUs; default: torch")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="may be given several times")
    add("--out", type=Path, default=Path("outputs"), help="folder for images; default: outputs")
    add(
        "--grid",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="write grid.png, all images with their prompts; default: if there are several",
    )
    add("--no-metadata", action="store_true", default=False, help="write nothing but pixels")
    add("--from", dest="again", type=Path, metavar="PNG", default=None, help="draw it again")

    _add_drawing(parser)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("drawing: how to draw").add_argument
    add("--steps", type=int, help="more are finer and slower; default: 50, or a student's")
    add("--sampler", help=f"default: ddim; of {', '.join(SAMPLERS)}")
    add("--level_spacing", help="of the noise levels: karras, trailing, …; default: the model's")
    add("--guidance_scale", type=float, help="1 is off; default: 7.5, or 1 for a student")
    add("--guidance_rescale", type=float, help="0 to 1, takes back contrast; default: 0")
    add("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="sigma / alpha")
    add("--guidance_eta", type=float, help="projected guidance: below 1 less saturated")
    add("--guidance_norm_threshold", type=float, help="projected guidance: its longest step")
    add("--guidance_momentum", type=float, help="projected guidance: of earlier steps")
    add("--negative_prompt", help="what to stay away from")
    add("--prompt_weighting", action="store_true", help='let "(word:1.2)" weigh a word')
    add("--num_images", type=int, help="images of each prompt; default: 1")
    add("--batch_size", type=int, default=None, help="images at once; default: what fits")
    add("--seed", type=int, help="of the first image; the others count up")
    add("--variation_strength", type=float, help="0 to 1, towards the variation seed")
    add("--variation_seed", type=int, help="of the first image; the others count up")
    add("--height", type=int, help="in pixels; default: the model's")
    add("--width", type=int, help="in pixels; default: the model's")

    _add_editing(parser)
    _add_costs(parser)


def _add_editing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("image: an image to start from").add_argument
    add("--image", type=Path, help="image-to-image: what to draw over")
    add("--strength", type=float, help="0 to 1: how much of it to give up; default: 0.8")
    add("--mask_image", type=Path, help="inpainting: white is drawn anew, black is kept")


def _add_costs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cost: time and memory").add_argument
    add("--compile", action="store_true", default=False, help="a minute or more first, then faster")
    add(
        "--batched",
        action="store_true",
        default=False,
        help="a CPU denoises all at once, though their last bits then depend on it",
    )
    add("--cache_interval", type=int, help="2 to 5: evaluate whole at each so many-th step only")
    add(
        "--vae_tiling", type=int, metavar="PIXELS", help="decode large images in tiles of this side"
    )


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ValueError(f"batch_size={arguments.batch_size} must be at least 1")
    prompts = getattr(arguments, "prompt", [])
    for prompt in prompts:
        if Path(prompt.removeprefix("@")).suffix == ".txt":
            print(
                f"latentdiff: {prompt!r} is drawn as words, and no file is read; give a file of "
                "prompts as --prompts",
                file=sys.stderr,
            )
    if arguments.prompts is not None:
        if not (more := read_prompts(arguments.prompts)):
            raise ValueError(f"--prompts: {arguments.prompts} has no prompts, one a line")
        arguments.prompt = prompts = [*prompts, *more]
    if arguments.again is None and not prompts:
        raise ValueError('nothing to draw; give a PROMPT such as "a cat", or --from an image')
    if arguments.again is None:  # whose model is known when its record is read
        say_reading(getattr(arguments, "model", "emoji"), getattr(arguments, "dtype", "float32"))
    from latentdiff.cli.drawing import draw

    draw(arguments)
