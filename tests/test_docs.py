"""The documentation: its code runs, the site builds strictly and loads nothing from elsewhere, lists are whole."""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from nets import FSDP2_RUNS
from PIL import Image

import interpgrad
from interpgrad import graph

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))]
NOTEBOOKS = {
    "first-training": "count, held_out, epochs = 128, 32, 1",
    "evaluation": "count, held_out, epochs, examined = 128, 32, 1, 8",
}


def code_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def absent(block):
    """What this block imports that is not installed, or does not run."""
    names = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    needed = {name.partition(".")[0] for name in names}
    needed |= {"tensorboard"} if "torch.utils.tensorboard" in names else set()
    not_installed = {name for name in needed if importlib.util.find_spec(name) is None}
    return not_installed if FSDP2_RUNS or "torch.distributed.fsdp" not in names else {"FSDP2 on CPUs", *not_installed}


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A working directory with photographs, where one process is a process group and no logger calls home."""
    for folder in (Path("photos", part, name) for part in ("train", "test") for name in ("cat", "dog")):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (70, 60), (80 * index, 90, 100)).save(tmp_path / folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.cpu("the code of the documents chooses its device")
@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page)])
def test_code_of_the_page_runs(page, somewhere):
    """As pasted: its Python blocks, one after the other, in a namespace that is empty before the first.

    Blocks whose packages are not installed are left out.
    """
    namespace, missing = {"__name__": "page"}, set()
    for index, block in enumerate(code_blocks(page)):
        if absent(block):
            missing |= absent(block)
        else:
            exec(compile(block, f"{page}, block {index}", "exec"), namespace)
    if missing:
        pytest.skip(f"all but what needs {', '.join(sorted(missing))} ran")


@pytest.mark.slow
@pytest.mark.cpu("the code of the documents chooses its device")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, monkeypatch, capsys):
    """Its cells, with fewer images and epochs in the cell that is there to be changed."""
    pytest.importorskip("sklearn")
    pytest.importorskip("IPython")
    monkeypatch.chdir(DOCS / "tutorials")
    monkeypatch.setattr(sys, "path", list(sys.path))
    cells = json.loads(Path(f"{name}.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in codes), "outputs are made when the site is built: clear them"
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in codes) == 1
    namespace = {"__name__": "notebook"}
    for index, cell in enumerate(codes):
        small = "parameters" in cell["metadata"].get("tags", [])
        source = NOTEBOOKS[name] if small else "".join(cell["source"]).removeprefix("%matplotlib inline\n")
        exec(compile(source, f"{name}, cell {index}", "exec"), namespace)


def test_every_notebook_is_run():
    assert {path.stem for path in DOCS.rglob("*.ipynb")} == NOTEBOOKS.keys()


def test_readme_is_short():
    """At most 900 words: all there are outside of code blocks, tables included."""
    text = re.sub(r"```.*?```|<!--.*?-->|<img.*?>", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    words = re.findall(r"\w+", re.sub(r"\]\([^)]*\)", "]", text))  # not the addresses of links
    assert 300 < len(words) <= 900


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)", text) + re.findall(r'src="([^"]+)', text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: that of $SITE, or one with unexecuted notebooks."""
    if "SITE" in os.environ:
        return ROOT / os.environ["SITE"]
    pytest.importorskip("mkdocs")
    target = tmp_path_factory.mktemp("site")
    # Not --quiet: strict would not hear the warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = os.environ | {"DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "true"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    return target


@pytest.mark.slow
def test_site_reads_nothing_from_elsewhere(site):
    """No font, script, style or picture of another host, nor its repository's stars: links are all that leads away."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for path in pages:
        assert 'data-md-component="source"' not in path.read_text(), path
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", path.read_text()):
            if re.search(r'rel="(canonical|prev|next|edit)"', tag):
                continue
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), f"{path}: {tag}"


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    """Those of notebooks and of HTML too, which the strict build does not look at."""
    identifiers = {path: set(re.findall(r'\bid="([^"]+)"', path.read_text())) for path in site.rglob("*.html")}
    for path in identifiers.keys() - {site / "404.html"}:  # whose links begin at the host
        for link in re.findall(r'<(?:a|img)\b[^>]*?(?:href|src)="([^"]+)"', path.read_text()):
            if re.match(r"[a-z]+:", link):
                continue
            to, _, anchor = link.partition("#")
            target = (path.parent / to).resolve() if to else path
            assert target.is_file(), f"{path}: {link}"  # a browser without a server lists a folder
            if anchor and not anchor.startswith("__"):
                assert anchor in identifiers[target], f"{path}: {link}"


@pytest.mark.slow
def test_the_site_is_searched_without_a_server(site):
    """The index is a script, and what the search runs in comes before the theme's own scripts."""
    assert (site / "search" / "search_index.js").read_text().startswith("var __index = ")
    for path in site.rglob("*.html"):
        scripts = re.findall(r'<script[^>]* src="([^"]+)"', path.read_text())
        assert scripts[0].endswith("javascripts/iframe-worker.js"), path
        assert (site / scripts[0].lstrip("/") if path.stem == "404" else path.parent / scripts[0]).is_file(), path


@pytest.mark.slow
def test_the_site_knows_its_repository(site):
    (address,) = re.findall(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f'href="{address}"' in (site / "index.html").read_text()
    assert f'href="{address}/edit/main/docs/evidence/cost.md"' in (site / "evidence" / "cost.html").read_text()


@pytest.mark.slow
def test_pages_of_the_site_are_short(site):
    """At most 2,500 words, tables and code included; but for the changelog, which grows."""
    for path in set(site.rglob("*.html")) - {site / "changelog.html"}:
        (article,) = re.findall(r"<article\b.*?</article>", path.read_text(), re.DOTALL)
        text = re.sub(
            r"<(script|style|svg)\b.*?</\1>|<(?!/?(?:a|b|code|em|span|strong)\b)[^>]*>", " ", article, flags=re.DOTALL
        )
        assert len(re.sub(r"<[^>]*>", "", text).split()) <= 2500, path


@pytest.mark.slow
def test_every_public_function_has_a_heading_of_the_site(site):
    """Its own, in the reference, with its signature on several lines if it is long."""
    headings = "".join(
        heading
        for path in (site / "reference").glob("*.html")
        for heading in re.findall(r"<h[2-4]\b[^>]*>", path.read_text())
    )
    for module in (interpgrad, interpgrad.metrics, interpgrad.plot, interpgrad.saliency):
        for name, thing in vars(module).items():
            if inspect.isfunction(thing) or inspect.isclass(thing):
                own = not name.startswith("_") and thing.__module__.startswith(module.__name__)
                names = {f"{thing.__module__}.{thing.__qualname__}", f"{module.__name__}.{name}"}
                assert not own or any(f'id="{each}"' in headings for each in names), names
    signatures = re.findall(
        r'<div class="doc-signature.*?</div>', (site / "reference/saliency.html").read_text(), re.DOTALL
    )
    assert len(signatures) >= len(interpgrad.saliency.CAMS)
    for signature in signatures:
        assert max(map(len, re.sub(r"<[^>]+>", "", signature).splitlines())) <= 100


# Functions of Python's attribute protocol have a message of its own.
PROTOCOL = "module … has no attribute …"


def template(node):
    """The text of a string literal, … for what is put in; None of other nodes."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def messages():
    """The templates of all error messages of the package, found where exceptions are made and texts begin like one."""
    found = {}
    for path in sorted((ROOT / "interpgrad").rglob("*.py")):
        inside = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                inside.update(map(id, node.values))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                for argument in node.args[:1]:
                    if template(argument):
                        found[template(argument)] = f"{path.name}:{node.lineno}"
            text = None if id(node) in inside else template(node)
            if text and text.startswith("expected "):
                found[text] = f"{path.name}:{node.lineno}"
    return {text: place for text, place in found.items() if text != PROTOCOL}


def troubleshooting():
    return "".join(page.read_text() for page in sorted(DOCS.glob("troubleshooting*.md")))


def headings():
    return re.findall(r"^### (.*)$", troubleshooting(), re.MULTILINE)


def test_every_error_message_has_a_heading():
    """Its beginning, as far as a received value; and no heading is left of a message that is gone."""
    known, met = headings(), set()
    assert len(known) == len(set(known)) > 50
    for message, place in messages().items():
        matching = [heading for heading in known if re.match(re.escape(heading) + r"(?!\w)", message)]
        assert matching, f"{place}: add to docs/troubleshooting*.md a heading that begins {message!r}"
        met.add(max(matching, key=len))
    assert met == set(known), "no message begins so any more"


def test_every_opaque_node_is_explained():
    text = troubleshooting()
    assert [name for name in graph._OPAQUE if f"`{name}`" not in text] == []
