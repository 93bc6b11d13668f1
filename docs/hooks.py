"""What mkdocs does besides: the repository's address, links from notebooks, figures that stay on one line."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the repository's address from pyproject.toml, the only file that has it."""
    project = Path(config.config_file_path).with_name("pyproject.toml").read_text(encoding="utf-8")
    config.repo_url = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)[1]
    config.repo_name = config.repo_url.partition("://")[2].partition("/")[2]
    config.edit_uri = "edit/main/docs/"
    return config


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """Let notebooks' links to sources, which work where they are opened, lead to pages; see `figures` of tables."""
    if not page.file.src_uri.endswith(".ipynb"):
        return re.sub(r"<t[dh]\b.*?</t[dh]>", figures, html, flags=re.DOTALL)

    def to_page(link: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1]))
        target = files.get_file_from_path(source)
        return f'href="{get_relative_url(target.url, page.url)}"' if target else link[0]

    return re.sub(r'href="([^":#]+\.(?:md|ipynb))"', to_page, html)


def figures(cell: re.Match[str]) -> str:
    """A cell that breaks between a figure, its difference and its spread, and in code between words."""
    text = re.sub(r"(?<=[±→]) (?=[-+\d])|(?<=\d) (?=(?:ms|MB|GB)\b)|(?<=\S) (?=[↑↓])", "\N{NO-BREAK SPACE}", cell[0])
    text = re.sub(r"(\[[-+\d.]+,) ([-+\d.]+\])", "\\1\N{NO-BREAK SPACE}\\2", text)
    text = re.sub(r"<code>[^<]*", lambda code: re.sub(r"(?<=[_:./=])(?=[^\W_])", "<wbr>", code[0]), text)
    return re.sub(r"(?<=\d )(\([-+]\d.*?\)|\[[-+]\d.*?\])", r'<span class="difference">\1</span>', text)


def on_post_page(output: str, **_: Any) -> str:
    """Keep the theme from asking the repository's host for stars and releases."""
    return output.replace(' data-md-component="source"', "")


def on_post_template(output_content: str, **_: Any) -> str:
    """The same of the page for what is not found."""
    return on_post_page(output_content)
