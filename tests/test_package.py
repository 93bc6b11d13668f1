"""The package itself: what it imports, what it ships, what its files say of one another."""

import ast
import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import interpgrad

ROOT = Path(__file__).parent.parent

# Imports run one way: a module may import the ones before it that are named here, and no other.
MAY_IMPORT = {
    "errors": set(),
    "private": set(),
    "cleanup": set(),
    "model": {"cleanup", "private"},
    "inputs": {"model"},
    "metrics": {"autocast", "inputs", "model"},
    "plot": {"metrics"},
    "graph": {"cleanup", "double_backward", "private"},
    "criteria": {"autocast", "graph", "model"},
    "transforms": set(),
    "autocast": {"cleanup"},
    "double_backward": {"autocast", "cleanup", "private"},
    "guided": {"cleanup", "graph"},
    "frozen": {"cleanup", "double_backward", "graph", "private"},
    "sharded": {"private"},
    "forward": {"autocast", "cleanup", "double_backward", "graph", "model", "private", "sharded"},
    "settings": {"criteria", "guided"},
    "gradients": {
        "autocast",
        "criteria",
        "double_backward",
        "forward",
        "frozen",
        "graph",
        "guided",
        "model",
        "settings",
    },
    "targets": {"autocast", "errors", "gradients", "transforms"},
    "loss": {
        *("autocast", "criteria", "errors", "forward", "gradients", "graph", "model", "private", "settings"),
        *("targets", "transforms"),
    },
    "report": {
        *("criteria", "double_backward", "forward", "frozen", "gradients", "graph", "guided", "model", "settings"),
        "targets",
    },
    "integrations": {"forward", "loss"},
    "saliency": {"autocast", "cleanup", "criteria", "forward", "gradients", "graph", "inputs", "model", "settings"},
    "published": {"saliency"},
    "__main__": {"model", "plot", "published", "saliency"},
    "held_out": {"autocast", "criteria", "errors", "forward", "gradients", "model", "settings"},
    "__init__": {
        *("double_backward", "errors", "gradients", "held_out", "loss", "metrics", "plot", "report", "saliency"),
        "transforms",
    },
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_in(paths):
    names = {name.split(".")[1] for path in paths for name in imported(path) if name.startswith("interpgrad.")}
    return names & MAY_IMPORT.keys()


def test_imports_run_one_way():
    package = ROOT / "interpgrad"
    files = {path.stem: [path] for path in package.glob("*.py")}
    files |= {path.parent.name: list(path.parent.glob("*.py")) for path in package.glob("*/__init__.py")}
    assert files.keys() == MAY_IMPORT.keys()
    for name, paths in files.items():
        assert modules_in(paths) <= MAY_IMPORT[name] | {name}, name


def test_import_needs_torch_alone():
    """In a process where everything else that torch does not itself need is blocked."""
    blocked = [
        *("torchvision", "timm", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "torchmetrics", "tqdm"),
        *("captum", "hypothesis", "pytest", "transformers", "lightning", "accelerate"),
    ]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import torch, interpgrad\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))\n"
        "loss = interpgrad.InterpretableGradientLoss(model)(torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 0]))\n"
        "loss.backward()\n"
        "import interpgrad.saliency, interpgrad.metrics, interpgrad.plot\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with what a release would publish, built without the internet."""
    for name in ("build", "hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


def metadata(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
def test_wheel(dist):
    """It holds the package, the type marker and the licence, nothing else, and asks for torch alone."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"interpgrad", f"interpgrad-{interpgrad.__version__}.dist-info"}
    assert "interpgrad/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    found = metadata(dist)
    required = [each for each in found.get_all("Requires-Dist") if "extra ==" not in each]
    assert f'dependencies = ["{required[0]}"]' in (ROOT / "pyproject.toml").read_text()
    assert required[0].startswith("torch>=")
    assert len(required) == 1
    assert found["Requires-Python"] == ">=3.10"
    assert {each.partition(", ")[0] for each in found.get_all("Project-URL")} >= {"Repository", "Issues", "Changelog"}


@pytest.mark.slow
def test_source_distribution(dist):
    """It holds what its tests need."""
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for name in ("tests/test_package.py", "examples/quickstart.py", "Makefile", ".github/workflows/tests.yml"):
        assert name in names


@pytest.mark.slow
def test_twine(dist):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("PASSED") == 2


LINKS = r"\]\(([^)\s]+)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=[\"']([^\"']+)"


@pytest.mark.slow
def test_the_long_description_has_no_relative_links(dist):
    """Each goes to a file of the repository, which is there; code is as it was."""
    readme, described = (ROOT / "README.md").read_text(), metadata(dist).get_payload(decode=True).decode()
    fences = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    assert fences.findall(described) == fences.findall(readme)
    prose = fences.sub("", described)
    links = ["".join(found) for found in re.findall(LINKS, prose, re.MULTILINE)]
    urls = dict(each.split(", ") for each in metadata(dist).get_all("Project-URL"))
    of_files = 0
    for link in links:
        assert link.startswith(("https://", "#")), link
        if match := re.match(rf"{urls['Repository']}/(?:blob|raw)/main/([^#]+)", link):
            assert (ROOT / match[1]).exists(), link
            of_files += 1
    assert of_files


@pytest.mark.slow
def test_a_release_is_verified(dist, tmp_path):
    """As `make verify` does, with the wheel unpacked in the place of an installation; another version's tag fails."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)

    def verify(*tag):
        command = [sys.executable, "-W", "ignore", str(ROOT / ".ci" / "verify.py"), *tag]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    right = verify(f"v{interpgrad.__version__}")
    assert right.returncode == 0, right.stderr
    assert str(tmp_path) in right.stdout
    wrong = verify("v99.0.0")
    assert wrong.returncode == 1
    assert "got v99.0.0" in wrong.stderr


def test_the_oldest_environment_has_the_lowest_releases():
    project, pins = (ROOT / "pyproject.toml").read_text(), (ROOT / "tests" / "oldest.txt").read_text()
    for name in ("torch", "torchvision"):
        (lowest,) = re.findall(rf'"{name}>=([\d.]+)"', project)
        assert f"{name}=={lowest}.0\n" in pins
    (lowest,) = re.findall(r"torch >= ([\d.]+)", (ROOT / "README.md").read_text())
    assert f"torch=={lowest}.0\n" in pins


def test_versions_agree():
    for name in ("CHANGELOG.md", "CITATION.cff"):
        assert interpgrad.__version__ in (ROOT / name).read_text(), name


def test_public_names():
    assert set(interpgrad.__all__) <= set(dir(interpgrad))
    for name in interpgrad.__all__:
        assert getattr(interpgrad, name).__doc__


def test_the_compatibility_matrix_names_tests():
    """Every row of it one that exists."""
    matrix = re.search(
        r"<!-- matrix -->\n(.*)\n<!-- /matrix -->", (ROOT / "docs" / "compatibility.md").read_text(), re.DOTALL
    )[1]
    rows = matrix.splitlines()[2:]
    assert len(rows) > 25
    for row in rows:
        cell = row.split("|")[-2].strip()
        file, name = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", cell).groups()
        defined = {
            each.name for each in ast.walk(ast.parse((ROOT / "tests" / file).read_text())) if hasattr(each, "name")
        }
        assert name in defined, row
        assert re.search(r"\| (works|error)", row), row
