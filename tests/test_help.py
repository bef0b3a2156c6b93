"""`--help`: the few options that matter first, the others by group, and nothing heavy imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import CONFIGS, config_class

from latentdiff.options import flat_fields
from latentdiff.training import help as script_help
from latentdiff.training.command_line import parse_config

ROOT = Path(__file__).parent.parent


def shown(name: str, topic: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_config(config_class(name), ["--help", topic])
    said = capsys.readouterr()
    assert ended.value.code == (2 if said.err else 0)
    return said.out + said.err


@pytest.mark.parametrize("name", CONFIGS)
def test_help_shows_ten_options_and_names_the_groups(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was 103 options in 395 lines."""
    said = shown(name, "first", capsys)
    options = re.findall(r"^  --(\w+)", said, re.M)
    assert options[0] == "config"
    assert len(options) <= 10
    assert all(group in said for group in ("script", "data", "--help all", "examples:"))
    assert len(said.splitlines()) < 90


@pytest.mark.parametrize("name", CONFIGS)
def test_help_all_has_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(name, "all", capsys)
    options = set(re.findall(r"^  --(\w+)", said, re.M))
    assert {one.name for one in flat_fields(config_class(name))} <= options


def test_help_knows_groups_options_values_and_the_scripts_own_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = shown("train_vae", "optimizer", capsys)
    assert "[adamw|adamw8bit|muon]" in said
    assert "(default: 0.001)" in said  # the group's own is 1e-4
    assert "runs/shapes/vae" in shown("train_vae", "output_dir", capsys)
    assert "--unet.layers_per_block" in shown("train_unet", "unet", capsys)
    said = shown("train_vae", "optimiser", capsys)
    assert "there is no such group or option; did you mean optimizer?" in said


def test_help_is_asked_in_every_way_people_type_it() -> None:
    assert script_help.asked(["--help"]) == "first"
    assert script_help.asked(["--data", "x", "-h"]) == "first"
    assert script_help.asked(["--help", "--data"]) == "first"
    assert script_help.asked(["--help=all"]) == script_help.asked(["--help", "all"]) == "all"
    assert script_help.asked(["--data", "help"]) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_help_imports_nothing_heavy(name: str) -> None:
    """It took five seconds, in which torch was imported."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train/{name}.py', '--help']\n"
        f"try: runpy.run_path('train/{name}.py', run_name='__main__')\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: accelerate launch train/{name}.py ")


def test_help_that_is_read_in_part_ends_without_a_traceback() -> None:
    """As `--help all | head -1` reads it."""
    command = [sys.executable, "-m", "latentdiff.scripts.train_unet", "--help", "all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
