"""Packages: the npm tarballs that the drawings are made from, pinned by version and SHA-512."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """An npm package at a version, with the integrity that the registry gives for its tarball."""

    name: str
    version: str
    integrity: str
    """`sha512-` and the base64 of the tarball's SHA-512, as in `npm view NAME dist.integrity`."""

    @property
    def file_name(self) -> str:
        """The name of the tarball that `npm pack` writes: @a/b at 1.0.0 is "a-b-1.0.0.tgz"."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES: Mapping[str, Package] = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAu"
        "aw==",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMu"
        "VA==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgAL"
        "sw==",
    ),
    "fluent-emoji-flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXl"
        "Uw==",
    ),
    "fluent-emoji-3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h"
        "7g==",
    ),
    "fluent-emoji-high-contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX"
        "5w==",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CM"
        "Mg==",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78Dp"
        "iQ==",
    ),
    "streamline-emojis": Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE"
        "6A==",
    ),
    "concepts": Package(
        "unicode-emoji-json",
        "0.9.0",
        "sha512-HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQ"
        "ng==",
    ),
    "names": Package(
        "cldr-annotations-full",
        "48.2.0",
        "sha512-DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7P"
        "UQ==",
    ),
    "names of sequences": Package(
        "cldr-annotations-derived-full",
        "48.2.0",
        "sha512-log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZ"
        "mw==",
    ),
}

NAMES = ("concepts", "names", "names of sequences")
"""The packages that are no sets of drawings."""


@contextmanager
def tarballs(folder: Path | None, keys: Collection[str]) -> Iterator[dict[str, Path]]:
    """Give the checked tarballs of some of `PACKAGES`, from `folder` or fetched with `npm pack`.

    Fetched tarballs are in a temporary folder, which is deleted at the end.

    Raises:
        ValueError: npm is not installed or fails; a tarball is missing or is not the pinned one.
    """
    if folder is not None:
        yield _checked(folder, keys)
        return
    with tempfile.TemporaryDirectory() as temporary:
        _fetch(Path(temporary), keys)
        yield _checked(Path(temporary), keys)


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read the files of a tarball whose path in the package is wanted; nothing is extracted."""
    with tarfile.open(tarball) as tar:
        return {
            path: file.read()
            for member in tar
            if wanted(path := member.name.partition("/")[2])
            and (file := tar.extractfile(member)) is not None
        }


def _fetch(folder: Path, keys: Collection[str]) -> None:
    wanted = [f"{one.name}@{one.version}" for key, one in PACKAGES.items() if key in keys]
    advice = "or put the tarballs that `npm pack` writes into a folder and name it with --packages"
    if shutil.which("npm") is None:
        raise ValueError(
            f"npm is not installed, which fetches {', '.join(wanted)}: install it (Debian package "
            f"npm), {advice}"
        )
    command = ["npm", "pack", "--silent", *wanted]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise ValueError(
            f"`npm pack` cannot fetch {', '.join(wanted)} ({reason}): check the network, {advice}"
        )


def _checked(folder: Path, keys: Collection[str]) -> dict[str, Path]:
    paths = {key: folder / one.file_name for key, one in PACKAGES.items() if key in keys}
    for key, path in paths.items():
        name, version, integrity = PACKAGES[key]
        if not path.is_file():
            raise ValueError(
                f"packages={str(folder)!r} has no {path.name}: there, run `npm pack "
                f"{name}@{version}`"
            )
        found = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        if found != integrity:
            raise ValueError(
                f"{path} is not the pinned tarball of {name} {version}: its checksum is {found}, "
                f"not {integrity}; delete it and run `npm pack {name}@{version}` there"
            )
    return paths
