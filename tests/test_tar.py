"""The tar reader: what Python's tarfile wrote is found by offset, and traps are not sprung."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from latentdiff.data.forms.webdataset import samples
from latentdiff.data.tar import Member, members

LONG = "a" * 90 + "/" + "b" * 90 + "/" + "c" * 40 + ".png"


def pack(path: Path, files: dict[str, bytes], *, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def members_of(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return list(members(file, path.name))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_where_their_bytes_are(tmp_path: Path, form: int) -> None:
    files = {"a.png": b"1", "sub/b.jpg": b"2" * 512, "é猫.webp": b"3" * 513, "d.txt": b""}
    if form != tarfile.USTAR_FORMAT:
        files[LONG] = b"long"
    path = pack(tmp_path / "a.tar", files, form=form)
    whole = path.read_bytes()
    found = {m.name: whole[m.offset : m.offset + m.size] for m in members_of(path)}
    assert found == files
    assert list(found) == list(files)


def test_only_images_texts_and_json_are_looked_at(tmp_path: Path) -> None:
    names = ["a.pyd", "a.pkl", "a.pickle", "a.pth", "a.npy", "a.cls", "a.py", "a", "a.png.gz"]
    path = pack(tmp_path / "a.tar", dict.fromkeys(names, b"canary") | {"a.PNG": b""})
    assert [row["file_name"] for row in samples(path, ())] == ["a.PNG"]


def test_links_and_devices_are_passed_over_and_ways_out_are_bad(tmp_path: Path) -> None:
    """Nothing is opened by its name, but a name with a backslash was lost without a word."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            add(tar, "link.png", type=kind, linkname="/etc/passwd")
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            add(tar, "device.png", type=kind)
        names = ("/absolute.png", "../up.png", "a/../../up.png", "..\\up.png", "C:\\x.png")
        for name in (*names, "good..name.png"):
            add(tar, name, b"x")
    assert [member.name for member in members_of(path)] == [*names, "good..name.png"]
    *bad, good = samples(path, ())
    assert [row["_fault"] for row in bad] == ["unsafe name"] * len(names)
    assert "_fault" not in good


def test_a_pipe_is_only_a_name(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = pack(tmp_path / "a.tar", {f"pipe:touch {canary.name}.png": b"x"})
    assert len(members_of(path)) == 1
    assert not canary.exists()


def test_samples_are_grouped_by_name(tmp_path: Path) -> None:
    fields = {"text": "from JSON", "source": "web", "tags": ["a", "b"], "_shard": 7}
    files = {
        "01.jpg": b"one",
        "01.txt": b"\xef\xbb\xbfa cat\n",
        "01.json": json.dumps({**fields, "file_name": "../x"}).encode(),
        "x/01.json": json.dumps(fields).encode(),
        "x/01.seg.png": b"two",
        "lonely.txt": b"no image",
        "mute.webp": b"three",
    }
    path = pack(tmp_path / "s.tar", files)
    found = list(samples(path, ()))
    names = ["01.jpg", "x/01.seg.png", "mute.webp"]
    assert [row["file_name"] for row in found] == [*names[:2], "lonely.txt", *names[2:]]
    assert found.pop(2)["_fault"] == "missing image"
    assert found[0]["text"] == "a cat"
    assert found[1]["text"] == "from JSON"
    assert found[0]["tags"] == found[1]["tags"] == ["a", "b"]
    assert "_shard" not in found[0]
    assert "text" not in found[2]
    whole = path.read_bytes()
    for row, data in zip(found, (b"one", b"two", b"three"), strict=True):
        assert whole[row["_offset"] :][: row["_bytes"]] == data


@pytest.mark.parametrize(
    ("files", "fault", "detail"),
    [
        ({"a.jpg": b"", "a.txt": b"caf\xe9"}, "text is not UTF-8", "a.txt, byte 3"),
        ({"a.jpg": b"", "a.txt": b"\xef\xbb\xbfcaf\xe9"}, "text is not UTF-8", "a.txt, byte 6"),
        ({"a.jpg": b"", "a.txt": b"x" * (1 << 20) + b"x"}, "text is too long", "a.txt: 1048577"),
        ({"a.jpg": b"", "a.json": b"{"}, "damaged JSON", "a.json"),
        ({"a.jpg": b"", "a.json": b"[1]"}, "damaged JSON", "no JSON object"),
        ({"a.json": b"[" * 100_000, "a.jpg": b""}, "damaged JSON", "a.json"),
        ({"a.jpg": b"", "a.png": b""}, "two images of one name", "a.png"),
    ],
)
def test_what_is_wrong_with_a_sample_is_noted(
    tmp_path: Path, files: dict[str, bytes], fault: str, detail: str
) -> None:
    good = {"z.jpg": b"", "z.txt": b"fine"}
    first, last = samples(pack(tmp_path / "a.tar", files | good), ())
    assert first["_fault"] == fault
    assert detail in first["_detail"]
    assert "_fault" not in last


def test_every_cut_of_a_tar_is_told(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {f"{i}.png": bytes([i]) * 700 for i in range(3)})
    whole = path.read_bytes()
    for end in (*range(0, 3 * 1536, 97), 1536, 3072, 4608, 4609):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"a\.tar ends with"):
            members_of(path)


def test_a_damaged_header_is_told(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {"a.png": b"x" * 600, "b.png": b"y"})
    data = bytearray(path.read_bytes())
    data[1536 + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar is no tar file: bad header at byte 1536"):
        members_of(path)
    path.write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match=r"a\.tar is no tar file: bad header at byte 0"):
        members_of(path)


@pytest.mark.parametrize("size", ["\u00b2", "9" * 5000, "1e3", ""])
def test_a_size_that_is_no_number_is_told(tmp_path: Path, size: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "1.png", b"abc", pax_headers={"size": size})
    with pytest.raises(ValueError, match=r"a\.tar has a damaged pax header"):
        members_of(path)


def test_members_beyond_eight_gibibytes_are_found(tmp_path: Path) -> None:
    """GNU's binary sizes, on a file that is all hole."""
    path, size = tmp_path / "a.tar", 9 << 30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with path.open("wb") as file:
            for name, length in (("big.png", size), ("next.png", 5)):
                member = tarfile.TarInfo(name)
                member.size = length
                file.write(member.tobuf(form))
                file.seek(-(-length // 512) * 512, 1)
            file.write(bytes(1024))
        assert [(m.name, m.size) for m in members_of(path)] == [("big.png", size), ("next.png", 5)]
