"""`latentdiff web`: a page to draw with in the browser, and an API as OpenAI clients call it."""

import argparse
import os
import secrets
import socket
import tempfile
from pathlib import Path

from latentdiff.cli.reading import say_reading

TOKEN = "LATENTDIFF_TOKEN"
LEAST_TOKEN = 16  # characters
LIMITS = ("steps", "size", "images", "queue")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "web", help="draw in the browser, and answer as OpenAI's image API", allow_abbrev=False
    )
    parser.set_defaults(run=_web, parser=parser)
    add = parser.add_argument
    add("--model", default="emoji", help="as for generate; default: emoji")
    add("--models", type=Path, metavar="DIR", help="more models, chosen on the page by name")
    add("--loras", type=Path, metavar="DIR", help="LoRAs, chosen on the page by name")
    add("--runs", type=Path, metavar="DIR", help="trainings, whose progress is shown")
    add("--dtype", default="float32", help="float32, float16, bfloat16 or auto; default: float32")
    add("--device", help="such as cpu or cuda; default: an accelerator if any")
    add("--port", type=int, default=7860, help="default: 7860")
    add("--listen", action="store_true", help="let other machines in, who need the token")
    add("--token", help=f"of --listen; default: {TOKEN}, or a new one, which is printed")
    limits = parser.add_argument_group("the most that one visitor may ask for").add_argument
    limits("--max_steps", type=int, help="default: 150")
    limits("--max_size", type=int, help="pixels of a side; default: 1024")
    limits("--max_images", type=int, help="at once; default: 8")
    limits("--max_queue", type=int, help="orders that wait; default: 32")


def _web(arguments: argparse.Namespace) -> None:
    from latentdiff.web.app import create_app  # first: of what may be missing it names gradio

    # isort: split
    import uvicorn

    from latentdiff.cli.drawing import find_device, load_pipeline
    from latentdiff.web.choices import Choices
    from latentdiff.web.drawings import Drawings, Limits

    token = _token(arguments)
    given = {name: getattr(arguments, f"max_{name}") for name in LIMITS}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"--max_{name} {value} must be at least 1")
    for option in ("models", "loras", "runs"):
        folder = getattr(arguments, option)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{option} {folder} is not a folder")
    if arguments.dtype not in (dtypes := ("float32", "float16", "bfloat16", "auto")):
        raise ValueError(f"--dtype {arguments.dtype} must be one of {', '.join(dtypes)}")
    device = find_device(arguments.device)
    bound = _bound("0.0.0.0" if arguments.listen else "127.0.0.1", arguments.port)
    say_reading(arguments.model, arguments.dtype)
    choices = Choices(arguments.model, arguments.models, arguments.loras)
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    drawings = Drawings(
        lambda model: load_pipeline(model, dtype=arguments.dtype, device=device), choices, limits
    )
    with tempfile.TemporaryDirectory(prefix="latentdiff-web-") as folder, bound:
        app = create_app(
            drawings,
            Path(folder),
            runs=arguments.runs,
            token=token,
            listen=arguments.listen,
            names=[socket.gethostname()],
        )
        _say_address(bound.getsockname()[1], token)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        try:
            uvicorn.Server(config).run(sockets=[bound])
        finally:
            drawings.close()


def _token(arguments: argparse.Namespace) -> str:
    """The token of a server that listens, or "". Raises ValueError for one that is guessed soon."""
    if not arguments.listen:
        if arguments.token is not None:
            raise ValueError("--token needs --listen; without it only this machine can ask")
        return ""
    token = arguments.token or os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    if len(token) < LEAST_TOKEN:
        source = "--token" if arguments.token else TOKEN
        raise ValueError(
            f"{source} has {len(token)} characters; it must have {LEAST_TOKEN} or more"
        )
    return token


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the port, taken before a model is read. Raises ValueError if that is not free."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} must be from 0 to 65535; 0 is any that is free")
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"--port {port} cannot be used ({error.strerror}); give another"
        ) from error
    return bound


def _say_address(port: int, token: str) -> None:
    """Print where the page is."""
    if not token:
        print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
        return
    query = f"/?token={token}"
    print(f"here:   http://127.0.0.1:{port}{query}", flush=True)
    print(f"others: http://{socket.gethostname()}:{port}{query}, or by this machine's address")
    print(f"API:    Authorization: Bearer {token}  (Ctrl-C ends the server)", flush=True)
