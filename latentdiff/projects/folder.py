"""A project's folder: which one may become a project, and what is in one that is."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from latentdiff.formats.prompts import read_prompts
from latentdiff.formats.yaml_text import parse_yaml

MODULES = ("vae", "clip", "cache", "unet")
"""In the order in which they run; each is a file NAME.yaml and a folder NAME of the project."""
PROMPTS = "prompts.txt"


def check_free(project: Path) -> None:
    """Raise ValueError for a folder that holds anything, saying whether it is a project."""
    if not project.exists() or (project.is_dir() and not any(project.iterdir())):
        return
    if is_project(project):
        raise ValueError(
            f"{project} exists; choose another name, or go on with it: latentdiff train {project}"
        )
    raise ValueError(
        f"{project} exists and is no project; choose another name, of a folder that is new or empty"
    )


def check_project(project: Path) -> None:
    """Raise ValueError for a folder that is no project, saying how there may be one."""
    missing = [f"{name}.yaml" for name in MODULES if not (project / f"{name}.yaml").is_file()]
    if not missing:
        return
    if len(missing) < len(MODULES):
        raise ValueError(
            f"{project} has no {missing[0]}; `latentdiff new` of another name with the same --data "
            "writes one, which may be copied"
        )
    said = f"{project} is no project: it has no {missing[0]}; "
    if is_project(project.parent) and project.name in MODULES:
        raise ValueError(
            f"{said}it is a part of one: latentdiff train {project.parent} {project.name}"
        )
    if near := _near(project):
        raise ValueError(f"{said}did you mean {str(near)!r}?")
    if project.is_dir() and any(project.iterdir()):
        raise ValueError(
            f"{said}if it holds your images, `latentdiff new PROJECT --data {project}` makes one, "
            "PROJECT being a new name"
        )
    raise ValueError(f"{said}`latentdiff new {project} --data FOLDER` makes one")


def is_project(folder: Path) -> bool:
    """Whether the configurations of all modules are there."""
    return all((folder / f"{name}.yaml").is_file() for name in MODULES)


def read_module(project: Path, name: str) -> dict[str, Any]:
    """The configuration of a module. Raises ValueError for a file that is none."""
    path = project / f"{name}.yaml"
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("output_dir"), str):
        raise ValueError(f"{path} must be a mapping with output_dir, the folder of its results")
    steps = values.get("max_steps")
    if name != "cache" and (type(steps) is not int or steps < 1):
        raise ValueError(f"{path}: max_steps={steps} must be a whole number of at least 1")
    return values


def project_prompts(project: Path) -> list[str]:
    """What is drawn in the end; nothing without the file. Raises ValueError if it is no UTF-8."""
    path = project / PROMPTS
    return read_prompts(path) if path.is_file() else []


def _near(project: Path) -> Path | None:
    """The project beside this one whose name is most like it."""
    if project.exists() or not project.parent.is_dir():
        return None
    named = {folder.name: folder for folder in project.parent.iterdir() if is_project(folder)}
    near = difflib.get_close_matches(project.name, named, n=1)
    return named[near[0]] if near else None
