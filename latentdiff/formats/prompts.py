"""A file of prompts, one a line; empty lines are left out."""

from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """Its prompts. Raises OSError where there is no such file, ValueError if it is no UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save it as such") from error
    return [line for line in lines if line.strip()]
