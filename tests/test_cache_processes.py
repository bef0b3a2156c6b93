"""The latent cache as users make it: by several processes, and by one that is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.scripts import ROOT
from test_cache import contents, vae, write_images

pytestmark = pytest.mark.processes

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with 60 images, a VAE and the cache that one process makes of them."""
    folder = tmp_path_factory.mktemp("home")
    write_images(folder / "set", 60)
    vae().save_pretrained(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert start(folder, folder / "one", []).wait() == 0
        yield folder


def start(home: Path, out: Path, launcher: list[str]) -> subprocess.Popen[bytes]:
    options = (
        f"--data={home / 'set'} --output_dir={out} --vae={home / 'vae'} --image_size=16 "
        "--bucket_step=8 --max_aspect=4 --flip=true --crops=2 --chunk_size=1 --batch_size=4 "
        "--check_latents=false"
    )
    command = [sys.executable, *launcher, str(ROOT / "train" / "cache_latents.py")]
    return subprocess.Popen([*command, *options.split()])


def assert_same(cache: Path, reference: Path) -> None:
    """All files are equal but the configuration, which names the folder."""
    found, expected = contents(cache), contents(reference)
    assert found.pop("config.yaml") != expected.pop("config.yaml")
    assert found == expected


def test_two_processes_write_the_cache_of_one(home: Path) -> None:
    assert start(home, home / "two", TWO).wait() == 0
    assert_same(home / "two", home / "one")


def test_a_killed_process_goes_on_where_it_was(home: Path) -> None:
    out = home / "killed"
    process = start(home, out, [])
    while len(list(out.glob("chunk-*"))) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = [path.name.split(".")[0].split("-")[1] for path in out.glob("chunk-*")]
    assert 4 <= len(finished) < 60

    def written() -> dict[str, tuple[int, int]]:
        """The files of finished chunks, with what changes when they are written anew."""
        files = [path for number in finished for path in out.glob(f"moments-{number}-*")]
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    before = written()
    (out / ".moments-00000-16x16.npy.1.tmp").touch()  # as if it was killed at that moment
    assert start(home, out, []).wait() == 0
    assert written() == before
    assert_same(out, home / "one")
