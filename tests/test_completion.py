"""`latentdiff completion`: the shell itself completes; and `generate --help` in short and long."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys

import pytest
from support.command import run

pytest.importorskip("shtab")


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "last", "completed"),
    [
        ("latentdiff gen", 1, "generate"),
        ("latentdiff generate --batch_", 2, "--batch_size"),
        ("latentdiff generate --sampler dpmpp_2m", 3, "dpmpp_2m dpmpp_2m_sde"),
    ],
)
def test_bash_completes(words: str, last: int, completed: str) -> None:
    *_, before, word = words.split()
    script = (
        f'eval "$({sys.executable} -m latentdiff.cli completion bash)"\n'
        f"COMP_WORDS=({words}); COMP_CWORD={last}\n"
        "called=$(complete -p latentdiff | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        f'$called latentdiff {word} {before}; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == completed.split()


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_completes_before_the_first_prompt() -> None:
    """It listed what fitted, with the prompt's help, and inserted nothing."""
    command = f"{sys.executable} -m latentdiff.cli completion zsh"
    shell, terminal = pty.openpty()
    options = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "close_fds": True}
    process = subprocess.Popen(["zsh", "-f"], start_new_session=True, **options)
    os.close(terminal)
    said = ""

    def until(words: str) -> None:
        nonlocal said
        while words not in said:
            assert select.select([shell], [], [], 30)[0], said
            said += os.read(shell, 4096).decode(errors="replace")

    try:
        ready = f"autoload -U compinit && compinit -u -D; eval \"$({command})\"; echo rea''dy\n"
        os.write(shell, b"latentdiff() { echo got $2; }; " + ready.encode())
        until("ready")
        os.write(shell, b"latentdiff generate --sampl\t\n")
        until("got --sampler")
    finally:
        process.kill()
        process.wait()
        os.close(shell)


@pytest.mark.processes
def test_a_reader_that_has_enough_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m latentdiff.cli completion zsh | head -1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("#compdef")
    assert not done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", shell) == 0
    assert "generate" in capsys.readouterr().out


def test_help_of_generate_is_short_and_names_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--help") == 0
    short = capsys.readouterr().out
    assert len(re.findall(r"^  (?:--|PROMPT)", short, re.M)) == 10
    assert all(one in short for one in ("model:", "drawing:", "image:", "examples:"))
    assert run("generate", "--help", "drawing") == 0
    assert "--guidance_rescale" in capsys.readouterr().out
    assert run("generate", "--help", "all") == 0
    assert "--mask_image" in capsys.readouterr().out
    assert run("generate", "--help", "sampling") == 2
    assert "the groups are model, drawing, image, cost, and all" in capsys.readouterr().err
