"""What can be wrong with a file: mutations of bytes and JSON, and a watch on what reading does."""

import base64
import io
import json
import math
import os
import pickle
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

# Values that break what trusts them: wrong types, huge and negative numbers, words that are paths.
NASTY: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    64,
    77,
    0.5,
    -0.5,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    10**6,
    10**9,
    2**31,
    2**63,
    2**64,
    10**30,
    10**4000,
    "",
    "0",
    "4",
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\windows",
    "C:\\model.safetensors",
    "//host/share",
    "file:///etc/passwd",
    "https://example.com/model.safetensors",
    "\0",
    "\ud800",
    "nul",
    "🦔" * 50,
    "a" * 100_000,
    "os.system",
    "__import__('os').system('touch canary')",
    "${jndi:ldap://example.com}",
    [],
    [1],
    [0],
    [-1, -1],
    [1, 2, 3, 4],
    [8, 16],
    [10**9, 10**9],
    [[[[[]]]]],
    ["a"],
    [None],
    [True, True],
    [1] * 100_000,
    ["a"] * 100_000,
    {},
    {"a": 1},
    {"": {"": {"": {}}}},
    {"__class__": "os.system", "args": ["touch canary"]},
]
LENGTHS = (0, 1, 7, 8, 100, 10**6, 16_000_000, 16_000_001, 2**31, 2**32, 2**63, 2**64 - 1)


def broken_bytes(content: bytes, random: Random) -> bytes:
    """One to four of: a bit flipped, bytes overwritten, cut, put in, doubled, the end cut off."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = (
            random.randrange(len(data) + 1)
            if random.random() < 0.3
            else random.randrange(min(len(data), 400) + 1)
        )
        some = random.choice((1, 1, 2, 8, 40))
        kind = random.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at : at + some] = random.randbytes(len(data[at : at + some]))
        elif kind == 2:
            del data[at : at + some]
        elif kind == 3:
            data[at:at] = random.choice((b"\0", b'"', b"{", b"}", b"[", b",", b"9", b" ")) * some
        elif kind == 4:
            data[at:at] = data[at : at + some]
        elif kind == 5:
            del data[at:]
        else:
            data += random.randbytes(some)
    return bytes(data)


def broken_json(content: Any, random: Random) -> str:
    """The JSON text of a value in which one to three entries are wrong."""
    value = json.loads(json.dumps(content))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        parent, key = random.choice(list(_entries(value)) or [(None, None)])
        kind = random.randrange(8)
        if parent is None or kind == 0:
            other = random.choice(NASTY)
            if isinstance(value, dict):
                names = [str(other)[:50], "auto_map", "_class_name", "custom_pipeline"]
                value[random.choice(names)] = random.choice(NASTY)
        elif kind == 1:
            del parent[key]
        elif kind == 2:  # another's value
            other, name = random.choice(list(_entries(value)))
            parent[key] = json.loads(json.dumps(other[name]))
        elif kind == 3 and isinstance(parent[key], int | float):
            factor = random.choice((-1, 2, 0.5, 10**9, 1.0))
            parent[key] = parent[key] * factor
        elif kind == 4:
            parent[key] = [parent[key]]
        elif kind == 5:
            parent[key] = str(parent[key])
        else:
            parent[key] = random.choice(NASTY)
    text = json.dumps(value)
    kind = random.randrange(12)
    if kind == 0 and isinstance(value, dict) and value:  # a key twice
        key = random.choice(list(value))
        again = json.dumps({key: random.choice((value[key], random.choice(NASTY)))})
        return text[:-1] + ", " + again[1:]
    if kind == 1:
        deep = random.choice((10, 1_000, 100_000))
        return '{"a":' * deep + text + "}" * deep
    return text


def any_json(content: bytes, random: Random) -> bytes:
    if random.random() < 0.2:
        return broken_bytes(content, random)
    return broken_json(json.loads(content), random).encode("utf-8", "surrogatepass")


def broken_yaml(content: bytes, random: Random) -> bytes:
    """JSON is YAML, too: keys and values of other kinds, and broken bytes."""
    if random.random() < 0.5:
        return broken_bytes(content, random)
    return any_json(json.dumps(yaml.safe_load(content)).encode(), random)


def broken_metadata(content: bytes, random: Random) -> bytes:
    """A single file whose metadata is wrong, mostly in our own entry, which is packed JSON."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    if random.random() < 0.8:
        text = zlib.decompress(base64.b64decode(metadata["latentdiff"]))
        packed = zlib.compress(any_json(text, random))
        if random.random() < 0.1:
            packed = broken_bytes(packed, random)
        metadata["latentdiff"] = base64.b64encode(packed).decode()
    else:
        metadata[random.choice(sorted(metadata))] = random.choice(NASTY)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def broken_safetensors(content: bytes, random: Random) -> bytes:
    """A safetensors file whose header lies: about a tensor, its own length, or in any byte."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = random.randrange(6)
    if kind == 0:
        return broken_bytes(content, random)
    if kind == 1:
        return random.choice(LENGTHS).to_bytes(8, "little") + content[8:]
    entries = json.loads(header)
    if kind == 2:  # offsets that overlap, leave holes or lead away
        names = [name for name in entries if name != "__metadata__"]
        for name in random.sample(names, random.randint(1, 2)):
            offsets = entries[name]["data_offsets"]
            offsets[random.randrange(2)] += random.choice((-8, -4, -1, 1, 4, 8, 2**40, -(2**40)))
        text = json.dumps(entries)
    elif kind == 3:  # whole tensors, moved or named otherwise
        names = [name for name in entries if name != "__metadata__"]
        one, other = random.choice(names), random.choice(names)
        if random.random() < 0.5:
            entries[one]["data_offsets"] = entries[other]["data_offsets"]
        else:
            entries[random.choice(("../a", "", "a\0b", "__metadata__", "x" * 10_000))] = (
                entries.pop(one)
            )
        text = json.dumps(entries)
    else:
        text = broken_json(entries, random)
    encoded = text.encode("utf-8", "surrogatepass")
    if random.random() < 0.2:
        encoded += b" " * random.randrange(16)
    return len(encoded).to_bytes(8, "little") + encoded + data


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: the list or object, and the index or key."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list) and len(inner) < 1000:
            yield from _entries(inner)


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def canaries(path: Path) -> list[bytes]:
    """Pickles of every form that make the folder `path`."""
    found = [pickle.dumps({"weight": Canary(path)}, protocol) for protocol in range(6)]
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"weight": Canary(path)}, file, _use_new_zipfile_serialization=zipped)
        found.append(file.getvalue())
    return found


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGING = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.chmod", "os.truncate")
_RUNNING = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
_watches: list[tuple[str, list[str]]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watches:
        return
    allowed, events = _watches[-1]
    writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
    if event in _RUNNING or (
        (writes or event in _CHANGING) and not os.fsdecode(args[0]).startswith((allowed, "/dev/"))
    ):
        events.append(f"{event} {args!r:.200}")


sys.addaudithook(_audit)  # for good, so that it listens only while somebody watches


@contextmanager
def watched(*, seconds: float, scratch: Path) -> Iterator[list[str]]:
    """What is run meanwhile, and written outside `scratch`; AssertionError after so many seconds.

    Python's own doings, that is: what compiled code writes shows in the folders afterwards.
    """

    def hangs(*_: object) -> None:
        raise AssertionError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _watches.append((str(scratch), []))
    try:
        yield _watches[-1][1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _watches.pop()


@contextmanager
def at_most_more_memory(size: int) -> Iterator[None]:
    """Let no allocation succeed that takes the process `size` bytes above what it has now."""
    import resource  # there is none on Windows

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
