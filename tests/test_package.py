"""The package itself: what it imports, what it ships, what its files say of one another."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import interpgrad

ROOT = Path(__file__).parent.parent

# Imports run one way: a module may import the ones before it that are named here, and no other.
MAY_IMPORT = {
    "errors": set(),
    "private": set(),
    "signals": set(),
    "model": {"private", "signals"},
    "plot": set(),
    "metrics": {"model", "faithfulness"},  # one name, imported where it is asked for
    "faithfulness": {"metrics"},
    "graph": {"private"},
    "criteria": {"autocast", "graph", "model"},
    "transforms": set(),
    "autocast": set(),
    "double_backward": {"autocast", "private", "signals"},
    "guided": {"graph"},
    "frozen": {"double_backward", "graph"},
    "forward": {"autocast", "double_backward", "model", "private"},
    "gradients": {
        "autocast",
        "criteria",
        "double_backward",
        "forward",
        "frozen",
        "graph",
        "guided",
        "model",
        "signals",
    },
    "loss": {"autocast", "criteria", "double_backward", "errors", "forward", "gradients", "guided", "signals"},
    "saliency": {"criteria", "forward", "gradients", "guided", "model", "signals"},
    "__init__": {"double_backward", "gradients", "loss", "transforms"},  # and those by name, once they are asked for
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
        *("captum", "hypothesis", "pytest"),
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


def test_wheel(tmp_path):
    """It holds the package, the type marker and the licence, nothing else, and asks for torch alone."""
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name.split("/")[0] for name in names} == {"interpgrad", f"interpgrad-{interpgrad.__version__}.dist-info"}
    assert "interpgrad/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.6"]
    assert "Requires-Python: >=3.10" in metadata


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


def test_readme_code_runs():
    """Every Python block of the README, one after the other, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    exec(
        "import torch, torch.nn.functional as F\nfrom torch import nn\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))\n"
        "x, y = torch.randn(5, 3, 8, 8), torch.randint(4, (5,))\n",
        namespace,
    )
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["loss"].requires_grad


def test_public_names():
    assert set(interpgrad.__all__) <= set(dir(interpgrad))
    for name in interpgrad.__all__:
        assert getattr(interpgrad, name).__doc__


def test_the_matrix_of_the_readme_names_tests():
    """Every row of it one that exists."""
    matrix = re.search(r"<!-- matrix -->\n(.*)\n<!-- /matrix -->", (ROOT / "README.md").read_text(), re.DOTALL)[1]
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
