"""What mkdocs does besides: the pictures of the examples are pages' pictures too, without a second copy."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).parent.parent / "examples"


def on_files(files: Files, config: Any) -> Files:
    """Add examples/*.png as images/*.png."""
    for path in sorted(EXAMPLES.glob("*.png")):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))
    return files
