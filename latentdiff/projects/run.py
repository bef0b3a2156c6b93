"""Runs what is not done of a project, part after part, and draws its prompts in the end."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from latentdiff.projects.folder import MODULES, PROMPTS, check_project, project_prompts, read_module
from latentdiff.training.checkpoint_files import checkpoints
from latentdiff.training.launch import launch

SCRIPTS = {
    "vae": "train_vae",
    "clip": "train_clip",
    "cache": "cache_latents",
    "unet": "train_unet",
}
IMAGES = "images"


def train_project(project: Path, module: str | None = None) -> int:
    """Run the modules that are not done, or the named one whether it is or not; their exit code.

    Raises ValueError for a folder that is no project.
    """
    check_project(project)
    settings = {name: read_module(project, name) for name in MODULES}
    project_prompts(project)  # it is needed in the end, too late to learn that it cannot be read
    ran = False
    print(f"cd {project}", flush=True)  # the paths that are printed below are from there
    with contextlib.chdir(project):
        for name in MODULES if module is None else [module]:
            if module is None and is_done(name, settings[name]):
                print(f"{name}: done", flush=True)
                continue
            ran = True
            script = f"latentdiff.scripts.{SCRIPTS[name]}"
            print(f"{name}: accelerate launch --quiet -m {script} --config {name}.yaml", flush=True)
            if code := launch(script, ["--config", f"{name}.yaml"]):
                return code
        if module not in (None, "unet"):
            return 0
        model = Path(settings["unet"]["output_dir"]) / "model"
        if (ran or not Path(IMAGES).is_dir()) and (code := _draw(model)):
            return code
    print(f'to draw: latentdiff generate "a prompt" --model {project / model} --out images')
    return 0


def is_done(name: str, settings: dict[str, Any]) -> bool:
    """Whether a module has been trained to its `max_steps`, or a cache been written to its end."""
    folder = Path(settings["output_dir"])
    if name == "cache":
        return (folder / "config.yaml").is_file()
    saved = checkpoints(folder / "checkpoints")
    return bool(saved) and saved[-1][0] >= settings["max_steps"] and (folder / "model").is_dir()


def _draw(model: Path) -> int:
    """Draw the project's prompts, as its owner would."""
    if not project_prompts(Path()):
        print(f"nothing is drawn, since {PROMPTS} has no prompts", flush=True)
        return 0
    options = ["--model", str(model), "--out", IMAGES, "--seed", "0"]
    print(f"drawing the prompts of {PROMPTS} into {IMAGES}/", flush=True)
    command = [sys.executable, "-m", "latentdiff.cli", "generate", "--prompts", PROMPTS, *options]
    return subprocess.run(command, check=False).returncode
