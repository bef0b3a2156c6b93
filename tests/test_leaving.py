"""How a process leaves that has others beside it: with its code, whatever its threads still do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import ROOT

pytestmark = pytest.mark.processes

SCRIPT = """
import atexit, sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from latentdiff.training.command_line import run_script
from latentdiff.training.processes import Processes

def main():
    processes = Processes(Accelerator(cpu=True))
    assert processes.count == 2
    atexit.register(print, "at exit")
    result = [torch.zeros(9), torch.zeros(9)]
    dist.all_gather(result, torch.ones(9), group=processes.group, async_op=True)  # nobody waits
    {ending}

run_script(main)
"""


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("return", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("raise ValueError('wrong')", 2, "error: wrong\n"),
        ("raise RuntimeError('a fault of ours')", 1, "RuntimeError: a fault of ours\n"),
    ],
)
def test_a_collective_under_way_does_not_change_how_a_script_ends(
    tmp_path: Path, ending: str, code: int, said: str
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(ending=ending))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert out == "at exit\n"
        assert err.endswith(said)
        assert said or not err
