"""What is often found in place of a file: a pointer of Git LFS, or a page of the web."""

PAGES = (b"<!doctype html", b"<html")


def stand_in(start: bytes) -> str | None:
    """Say what a file is, from its first bytes, when it is neither what its name says nor damaged.

    Git leaves pointers where it runs without Git LFS, and a browser or curl saves the page that
    asks for a login.
    """
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "is a pointer of Git LFS, not the file itself; `git lfs pull` fetches it"
    if start.lstrip()[:14].lower().startswith(PAGES):
        return "is a web page, not the file itself; download it again, logged in if it asks"
    return None
