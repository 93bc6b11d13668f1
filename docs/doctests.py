"""For the reference: examples in docstrings begin with >>> and no heading, which Markdown would take for quotations."""

import copy
import inspect
import re
from typing import Any

import griffe

from interpgrad import saliency

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)  # to the next empty line


class Doctests(griffe.Extension):
    """Fences them; and ends with one colon what reStructuredText ends with two."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = EXAMPLE.sub(lambda match: f"```pycon\n{match[0]}\n```", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Gives the class activation maps the signature that their decorator makes, which is not to be read."""
        module = pkg["saliency.cam"]
        for name, cam in saliency.CAMS.items():
            function = module[name]
            function.parameters = copy.deepcopy(module["guided_grad_cam"].parameters)
            function.parameters["chunk_size"].default = str(inspect.signature(cam).parameters["chunk_size"].default)
            function.returns = module["guided_grad_cam"].returns
