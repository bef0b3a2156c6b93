"""`latentdiff generate --prompts FILE`."""

from pathlib import Path

import pytest
from PIL import Image
from support.command import generate
from support.tiny import tiny_pipeline


def test_a_file_of_prompts_is_drawn_after_the_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline(tmp_path / "tokens").save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa dog\n\n  \n猫\r\n", encoding="utf-8")
    options = ("--prompts", str(file), "--seed", "0", "--no-grid")
    assert generate(model, tmp_path / "images", "a cat", *options) == 0
    drawn = []
    for path in sorted((tmp_path / "images").iterdir()):
        with Image.open(path) as image:
            drawn.append(image.info["parameters"].splitlines()[0])
    assert drawn == ["a cat", "a dog", "猫"]
    for content, sentence in ((b"\n\n", "has no prompts, one a line"), (b"\xff", "is not UTF-8")):
        file.write_bytes(content)
        assert generate(model, tmp_path / "images", *options) == 2
        assert sentence in capsys.readouterr().err
    assert generate(model, tmp_path / "images", "--prompts", "nowhere.txt") == 2
    assert "nowhere.txt" in capsys.readouterr().err
