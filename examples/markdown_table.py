"""Every table that scripts print and documents hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, of cells as they are: a | in one does not end it."""
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in (headings, *rows))
    return tabulate(escaped, headers="firstrow", tablefmt="github", disable_numparse=True)
