"""A hook of mkdocs: links to code of the repository lead to pages of the site that show it.

In docs/ they are relative, as a code host wants them; the site has no files outside of docs/.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
FOLDER = "code"
# Those of latentdiff/…, in a page or two folders deep; a heading's anchor, or a line of code.
_LINK = re.compile(r"\]\((?!\w+:)([^)\s#]+)(#[^)\s]*)?\)")
_PAGE = """---
search:
  exclude: true
hide: [toc, navigation]
---
# {path}

{fence}{{ .{language} linenums="1" }}
{text}
{fence}
"""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown"}


def _code(page: str, link: str) -> str | None:
    """The path in the repository that a link of a page leads to, if no page or image has it."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    outside = not path.startswith("docs/") or path.endswith(".py")
    return path if outside and (ROOT / path).is_file() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file that is linked to."""
    pages = [file for file in files.documentation_pages() if file.abs_src_path]
    paths = {
        path
        for file in pages
        for link, _ in _LINK.findall(file.content_string)
        if (path := _code(file.src_uri, link))
    }
    for path in sorted(paths):
        text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
        language = LANGUAGES.get(Path(path).suffix, "text")
        content = _PAGE.format(path=path, fence="`" * 6, language=language, text=text)
        files.append(File.generated(config, f"{FOLDER}/{path}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links to it."""
    here = page.file.src_uri
    if here.startswith(f"{FOLDER}/"):
        return markdown

    def turned(match: re.Match[str]) -> str:
        path = _code(here, match[1])
        if path is None:
            return match[0]
        link = posixpath.relpath(f"{FOLDER}/{path}.md", posixpath.dirname(here))
        line = (match[2] or "").removeprefix("#L")
        return f"]({link}{f'#__codelineno-0-{line}' if line else ''})"

    return _LINK.sub(turned, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Tell mkdocs which lines can be linked to: it sees no anchors within code."""
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        lines = re.findall(r'id="(__codelineno-0-\d+)"', html)
        page.present_anchor_ids = {*(page.present_anchor_ids or ()), *lines}
    return html
