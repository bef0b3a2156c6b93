"""What people install: the wheel, and the container's recipe, which no test here can build."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.scripts import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# Continued lines are one instruction.
INSTRUCTIONS = [
    line
    for line in re.sub(r"\\\n\s*", " ", DOCKERFILE).splitlines()
    if line and not line.startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in INSTRUCTIONS if line.split()[0] == name]


def test_what_the_container_copies_is_there_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
    assert set(PROJECT["license-files"]) | {PROJECT["readme"]} <= set(sources)


def test_the_containers_extras_exist_and_pins_are_used() -> None:
    (extras,) = (
        line.partition("=")[2] for line in instructions("ARG") if line.startswith("EXTRAS")
    )
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    (run,) = (line for line in instructions("RUN") if "pip install" in line)
    assert run.count("pip install") == run.count("--constraint /src/constraints.txt")


def test_the_container_follows_hadolints_rules() -> None:
    """DL3006 and DL3007: a tag that is not latest; DL3002: no root in the end; DL3000: absolute
    folders; DL3025: arguments as JSON; DL3042: no pip cache; DL3020: no ADD."""
    assert "latest" not in DOCKERFILE
    assert all(":" in line for line in instructions("FROM"))
    assert instructions("USER")[-1] not in ("root", "0")
    assert all(folder.startswith("/") for folder in instructions("WORKDIR"))
    assert all(
        line.startswith("[") for name in ("ENTRYPOINT", "CMD") for line in instructions(name)
    )
    assert "PIP_NO_CACHE_DIR=1" in DOCKERFILE
    assert not instructions("ADD")


@pytest.mark.processes
def test_the_wheel_holds_what_it_needs_and_nothing_of_the_repository(tmp_path: Path) -> None:
    """The wheel had neither training nor configurations."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "latentdiff"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert set(tracked) <= held
    assert {name.partition("/")[0] for name in held if ".dist-info" not in name} == {"latentdiff"}
