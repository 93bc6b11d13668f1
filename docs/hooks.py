"""What mkdocs does besides: links from notebooks."""

import posixpath
import re
from typing import Any

from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """Let a notebook's links to sources, which work where it is opened, lead to their pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def to_page(link: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1]))
        target = files.get_file_from_path(source)
        return f'href="{get_relative_url(target.url, page.url)}"' if target else link[0]

    return re.sub(r'href="([^":#]+\.(?:md|ipynb))"', to_page, html)
