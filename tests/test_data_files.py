"""Which files are samples: no form loses one that another reads, and what is not used is said."""

import json
import os
import sys
import tarfile
import unicodedata
from pathlib import Path

import datasets
import pytest
from PIL import Image
from support.broken_images import photograph, saved
from support.data_files import IMAGE, captioned, captions, config, opened, write
from test_tar import add, pack

from latentdiff.data.check import check_data
from latentdiff.data.decode import FORMATS, SUFFIXES
from latentdiff.data.opening import open_images

KINDS = {
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".avif": "AVIF",
    ".tga": "TGA",
    ".jp2": "JPEG2000",
    ".ico": "ICO",
    "": "PNG",
}
UNREAD = {".avif", ".tga", ".jp2", ".ico", ""}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def of_kinds() -> dict[str, bytes]:
    """Captioned images, 0.jfif, 1.jpe and so on."""
    files = {}
    for number, (suffix, kind) in enumerate(KINDS.items()):
        files |= {f"{number}{suffix}": saved(photograph((8, 8)), kind)}
        files |= {f"{number}.txt": suffix.encode() or b"none"}
    return files


def test_the_suffixes_are_those_that_pillow_gives_the_decoders_formats() -> None:
    """There were two lists, and a folder did not see .jfif, .jpe, .pbm and .pnm."""
    known = Image.registered_extensions().items()
    assert {name for name, kind in known if kind in {*FORMATS, "MPO"}} == SUFFIXES


@pytest.mark.parametrize("stream", [False, True])
def test_captioned_files_that_are_not_read_are_told(tmp_path: Path, stream: bool) -> None:
    """Of twelve captioned files eight were not there, not bad and not reported."""
    folder = write(tmp_path / "set", of_kinds())
    with pytest.warns(UserWarning, match=r"5 files with a caption are not used .*'4\.avif'"):
        dataset = open_images(config(folder, stream=stream))
    assert set(captions(dataset)) == KINDS.keys() - UNREAD


@pytest.mark.parametrize("stream", [False, True])
def test_text_files_that_metadata_go_before_are_told(tmp_path: Path, stream: bool) -> None:
    """Who edits 1.txt beside a metadata.jsonl would never see that it is not read."""
    rows = b'{"file_name": "a.png", "text": "of the metadata"}\n'
    folder = write(tmp_path / "set", captioned("a.png") | {"metadata.jsonl": rows})
    with pytest.warns(UserWarning, match=r"1 text files beside images are not used \('a\.txt'\)"):
        dataset = open_images(config(folder, stream=stream))
    assert captions(dataset) == ["of the metadata"]


def test_captions_may_be_in_upper_case_files(tmp_path: Path) -> None:
    """Windows' programs write 1.TXT beside 1.JPG, which had "no caption" then."""
    files = {name.upper(): content for name, content in captioned("a.png").items()}
    folder = write(tmp_path / "set", files)
    dataset = open_images(config(folder))
    assert (len(dataset), dict(dataset.left_out)) == (1, {})


def test_a_check_lists_captions_without_an_image_and_what_has_them(tmp_path: Path) -> None:
    files = captioned("a.png", "b.avif") | {"c.txt": b"alone", "a.npz": b"of another trainer"}
    folder = write(tmp_path / "set", files)
    with pytest.warns(UserWarning, match=r"1 files with a caption are not used \('b\.avif'\)"):
        summary = check_data(config(folder), tmp_path)
    assert summary.extra_files == {"count": 2, "first": ["b.avif", "c.txt"]}
    assert (summary.samples, summary.bad) == (1, 0)
    (folder / "metadata.csv").write_text("file_name,text\na.png,listed\n")
    (folder / "a.txt").unlink()
    summary = check_data(config(folder), tmp_path)
    assert summary.extra_files == {"count": 1, "first": ["b.avif"]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tar_reads_the_same_kinds_and_counts_the_others(tmp_path: Path, stream: bool) -> None:
    """A tar read four kinds of images, and lost the captions of all others."""
    path = pack(tmp_path / "a.tar", of_kinds())
    dataset = open_images(config(path, stream=stream, max_bad=0.9))
    assert set(captions(dataset)) == KINDS.keys() - UNREAD
    assert dataset.left_out == {"missing image": len(UNREAD)}
    with pytest.raises(ValueError, match=r"5 missing image; .*'4\.avif' is no image by its name"):
        opened(path)


@pytest.mark.parametrize("stream", [False, True])
def test_captions_that_do_not_stand_beside_their_images_are_told(
    tmp_path: Path, stream: bool
) -> None:
    """With allow_empty_caption every caption of such a tar was lost without a word."""
    files = captioned("a.png", "b.png")
    path = pack(tmp_path / "a.tar", {name: files[name] for name in sorted(files, key=len)})
    assert [*files] == ["a.png", "b.png", "a.txt", "b.txt"]
    options = {"stream": stream, "allow_empty_caption": True}
    with pytest.raises(ValueError, match=r"2 of 4 samples are bad, .*: 2 missing image"):
        captions(open_images(config(path, **options)))
    with pytest.raises(ValueError, match=r"no image stands beside 'a\.txt' in the tar"):
        opened(path, allow_empty_caption=True)


def test_what_macos_adds_to_a_tar_is_no_sample(tmp_path: Path) -> None:
    files = captioned("1.png", "2.png")
    hidden = {f"._{name}": b"\0\5\x16\7 of a Mac" for name in files}
    names = sorted([*files, *hidden], key=lambda name: (name.removeprefix("._"), len(name)))
    path = pack(tmp_path / "a.tar", {name: (files | hidden)[name] for name in names})
    assert captions(opened(path)) == ["1.png", "2.png"]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    """They were not followed, and nobody was told."""
    folder = write(tmp_path / "set", captioned("1.png", start="train/a/"))
    write(folder, captioned("2.png", start="test/b/"))
    (folder / "train/link").symlink_to(folder / "test/b")
    (folder / "train/again").symlink_to(folder / "test")  # which holds b
    (folder / "train/a/up").symlink_to("..")
    (folder / "test/b/loop").symlink_to(folder / "train")
    dataset, stream = opened(folder), open_images(config(folder, stream=True))
    assert sorted(captions(dataset)) == sorted(captions(stream)) == ["1.png", "2.png"]
    assert list(dataset.index.names()) == ["train/a/1.png", "train/again/b/2.png"]


def test_a_linked_folder_outside_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", captioned("1.png"))
    write(tmp_path / "elsewhere", captioned("2.png"))
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="set/more' is a link that leads out of the data"):
        assert captions(opened(folder)) == ["1.png"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", captioned("1.png") | captioned("2.png", start="more/"))
    (folder / "more").chmod(0)
    try:
        with pytest.raises(ValueError, match=r"cannot be read: .*more"):
            opened(folder)
    finally:
        (folder / "more").chmod(0o755)


FORMS = ("NFC", "NFD")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [False, True])
def test_names_meet_in_either_form_of_unicode(tmp_path: Path, form: str, stream: bool) -> None:
    """macOS writes é as two characters: all images of such metadata were missing."""
    other = FORMS[FORMS.index(form) - 1]
    image, named = (unicodedata.normalize(f, "é/ü.png") for f in (form, other))
    row = json.dumps({"file_name": named, "text": "listed"})
    folder = write(tmp_path / "set", {image: IMAGE, "metadata.jsonl": row.encode()})
    (example,) = open_images(config(folder, stream=stream)).some_examples(1)
    assert example["captions"] == ["listed"]
    assert check_data(config(folder), tmp_path).extra_files["count"] == 0
    beside = write(
        tmp_path / "beside",
        {unicodedata.normalize(form, "ü.png"): IMAGE, unicodedata.normalize(other, "ü.txt"): b"x"},
    )
    assert captions(open_images(config(beside, stream=stream))) == ["x"]
    assert check_data(config(beside), tmp_path).extra_files["count"] == 0


def test_a_backslash_in_metadata_is_told(tmp_path: Path) -> None:
    row = json.dumps({"file_name": r"sub\000.png", "text": "x"})
    folder = write(tmp_path / "set", {"sub/000.png": IMAGE, "metadata.jsonl": row.encode()})
    with pytest.raises(ValueError, match=r"file_name='sub\\\\000\.png' must be .*write / in place"):
        opened(folder)


BAD = os.fsdecode(b"caf\xe9.png")
ESCAPED = r"caf\udce9.png"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("stream", [False, True])
def test_a_name_that_is_not_utf8_is_one_bad_sample(tmp_path: Path, stream: bool) -> None:
    """One such name refused the whole set, without saying which."""
    folder = write(tmp_path / "set", captioned("1.png", BAD))
    summary = check_data(config(folder), tmp_path)
    assert summary.reasons == {"file name is not UTF-8": 1}
    line = json.loads((tmp_path / "bad_samples.jsonl").read_text(encoding="utf-8"))
    assert line["path"] == ESCAPED
    dataset = open_images(config(folder, stream=stream, max_bad=0.5))
    assert captions(dataset) == ["1.png"]
    assert dataset.left_out == {"file name is not UTF-8": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_metadata_and_tars_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    inside = os.fsdecode(b"caf\xe9")
    rows = [{"file_name": name, "text": name} for name in ("1.png", BAD, "\ud83d.png")]
    lines = "\n".join(map(json.dumps, rows)).encode()
    files = {"1.png": IMAGE, BAD: IMAGE, f"{inside}/3.png": IMAGE}
    files |= {"metadata.jsonl": lines, f"{inside}/metadata.csv": b"file_name,text\n3.png,three\n"}
    folder = write(tmp_path / "set", files)
    summary = check_data(config(folder), tmp_path)
    assert summary.reasons == {"file name is not UTF-8": 3}
    assert summary.extra_files == {"count": 1, "first": [ESCAPED]}
    assert captions(opened(folder, max_bad=0.9)) == ["1.png"]
    path = write(tmp_path / "tars", {}) / f"{inside}.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name in ("1.png", BAD, r"sub\2.png"):
            add(tar, name, IMAGE)
            add(tar, name[:-4] + ".txt", b"x")
    dataset = opened(path.parent, max_bad=0.9)
    assert dataset.left_out == {"unsafe name": 2}
    assert dataset[0]["captions"] == ["x"]
