"""Image folders: whole or not at all, and nothing that exists is ever overwritten."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from latentdiff.data.folder import Example, write_image_folder


def _example(split: str = "train", name: str = "a.png") -> Example:
    assert split in ("train", "test")
    return Example(split, name, Image.new("RGB", (4, 4), "red"), {"text": "红色"})


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Example]:
        yield _example()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_image_folder(tmp_path / "new" / "set", interrupted(), card=lambda: "")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "set"
    kept = out if kind == "file" else out / "kept.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        write_image_folder(out, [_example()], card=lambda: "")
    assert kept.read_text() == "mine"
    assert list(tmp_path.rglob("*")) == sorted({out, kept})


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "set", [_example("test", "b.png")], card=lambda: "card")
    (tmp_path / "other").mkdir()
    write_image_folder(tmp_path / "other", [_example("test", "b.png")], card=lambda: "card")
    for out in (tmp_path / "set", tmp_path / "other"):
        assert {str(path.relative_to(out)) for path in out.rglob("*")} == {
            "README.md",
            "test",
            "test/b.png",
            "test/metadata.jsonl",
        }
        assert (out / "test/metadata.jsonl").read_text(encoding="utf-8") == (
            '{"file_name": "b.png", "text": "红色"}\n'
        )
        assert out.stat().st_mode & 0o777 == 0o755
