"""What mkdocs does besides: pictures of the examples without a second copy, and links from notebooks."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

EXAMPLES = Path(__file__).parent.parent / "examples"


def on_files(files: Files, config: Any) -> Files:
    """Add examples/*.png as images/*.png."""
    for path in sorted(EXAMPLES.glob("*.png")):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))
    return files


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """Let a notebook's links to sources, which work where it is opened, lead to their pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def to_page(link: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1]))
        target = files.get_file_from_path(source)
        return f'href="{get_relative_url(target.url, page.url)}"' if target else link[0]

    return re.sub(r'href="([^":#]+\.(?:md|ipynb))"', to_page, html)
