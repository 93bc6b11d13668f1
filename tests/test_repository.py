"""What surrounds the code: workflows call make alone, hooks check what make lint does, forms ask for what is needed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import interpgrad.integrations

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = {
    "actions/checkout",
    "actions/setup-python",
    "actions/upload-artifact",
    "actions/download-artifact",
    "actions/upload-pages-artifact",
    "actions/deploy-pages",
    "pypa/gh-action-pypi-publish",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]


def test_no_two_files_have_one_name():
    """A search, a traceback and an import then name one file. Packages alone repeat theirs."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = [Path(each).name for each in tracked.stdout.split()]
    assert {each for each in names if names.count(each) > 1} <= {"__init__.py", "__main__.py"}


def test_pictures_are_small():
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.stat().st_size < 150_000, path


def read(path):
    content = yaml.safe_load(path.read_text())
    return {"on" if key is True else key: value for key, value in content.items()}  # YAML takes on for true


def jobs():
    return [(path.stem, name, job) for path in WORKFLOWS for name, job in read(path)["jobs"].items()]


def make(*arguments, cwd=ROOT):
    """What make would do, whatever make the tests themselves run under."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    own = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "TORCH", "VERSION", "PYTHON", "ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def commands(job):
    """The job's commands, for every value of what the matrix puts in."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job["steps"]:
        if "run" in step:
            (used,) = re.findall(r"\$\{\{ matrix\.(\w+) \}\}", step["run"]) or [None]
            for value in matrix[used] if used else [""]:
                yield re.sub(r"\$\{\{.*?\}\}", value, step["run"]), step


@pytest.mark.parametrize(("workflow", "name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_workflows_call_make_and_known_actions(workflow, name, job):
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step), step
        if "uses" in step:
            action, _, version = step["uses"].partition("@")
            assert action in ACTIONS, action
            assert version, action
    for command, step in commands(job):
        program, *arguments = shlex.split(command)
        assert program == "make", command
        found = make(*arguments)  # an unknown target is an error, and so is more than one line
        assert found.returncode == 0, found.stderr
        makefile = (ROOT / "Makefile").read_text()
        for variable in [*step.get("env", {}), *(each.partition("=")[0] for each in arguments if "=" in each)]:
            assert f"$({variable})" in makefile, f"{command} sets {variable}, of which the Makefile knows nothing"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_whole(path):
    """Needs that exist, a limit of time, no more rights than to read unless a job says so."""
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= workflow["jobs"].keys()


def test_the_matrix():
    """Every supported Python with the lowest, a middle and the newest PyTorch."""
    matrix = read(ROOT / ".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    lowest, middle, newest = matrix["target"]
    assert (lowest, newest) == ("test-oldest", "test")
    (bound,) = re.findall(r"^torch>=(\d+\.\d+)$", "\n".join(PROJECT["dependencies"]), re.MULTILINE)
    assert tuple(map(int, bound.split("."))) < tuple(
        map(int, re.fullmatch(r"test TORCH=(.*)\.\*", middle)[1].split("."))
    )


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["test", "TORCH=2.8.*"], '"torch==2.8.*"'),
        (["test-oldest"], "--constraint tests/oldest.txt"),
        (["test", "TORCH=nightly"], "--pre torch torchvision"),
    ],
)
def test_make_installs_the_pytorch_it_is_told(command, expected, tmp_path):
    (tmp_path / "tests").mkdir()
    for name in ("Makefile", "pyproject.toml", "tests/oldest.txt"):  # without an environment that is there already
        (tmp_path / name).write_text((ROOT / name).read_text())
    assert expected in make(*command, cwd=tmp_path).stdout
    plain = make("test", cwd=tmp_path).stdout
    assert "-m pytest" in plain
    assert "torch==" not in plain
    assert "--pre" not in plain


def test_releases_are_verified_and_trusted():
    """Nothing is published that was not installed and tried, and no secret is needed."""
    workflow = read(ROOT / ".github/workflows/release.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    publish, verify = workflow["jobs"]["publish"], workflow["jobs"]["verify"]
    assert publish["needs"] == "verify"
    assert verify["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
    (step,) = (step for step in verify["steps"] if "run" in step)
    assert step == {"run": "make verify", "env": {"VERSION": "${{ github.ref_name }}"}}


def test_hooks_check_what_make_lint_does():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"] for hook in repository["hooks"]]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert hooks == [line.strip().replace("$(RUN)", ".venv/bin/python") for line in recipe.splitlines()]


def test_hooks_are_valid():
    pytest.importorskip("pre_commit")
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


FORMS = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    form = read(path)
    assert form.keys() <= {"name", "description", "title", "labels", "assignees", "body"}
    assert form["name"]
    assert form["description"]
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"]["label"]


def test_bugs_come_with_their_environment():
    fields = {field["id"]: field for field in read(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert "python -m torch.utils.collect_env" in fields["environment"]["attributes"]["description"]
    assert "interpgrad.__version__" in fields["version"]["attributes"]["description"]
    assert all(fields[name]["validations"]["required"] for name in ("environment", "version", "code"))
    exec(fields["code"]["attributes"]["placeholder"], {})


def test_the_address_of_the_repository_is_in_one_file():
    """But for the README's first command, which is the same."""
    address = PROJECT["urls"]["Repository"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked or pytest.skip("no clone"):
        if name not in ("pyproject.toml", "README.md") and (ROOT / name).exists():
            assert address.encode() not in (ROOT / name).read_bytes(), name
    assert (ROOT / "README.md").read_text().count(address) == 1
    found = re.findall(r"https://github\.com/[\w-]+/[\w-]+", (ROOT / "pyproject.toml").read_text())
    assert set(found) == {address}


def test_links_between_documents():
    documents = [(ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md")]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", "".join(documents))
    assert len(links) >= 4
    for link in links:
        assert (ROOT / link).exists(), link


def test_public_names_that_contributing_promises():
    """What the stability policy calls public is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for dotted in re.findall(r"`interpgrad\.([\w.]+)`", text):
        found = interpgrad
        for name in dotted.split("."):
            found = getattr(found, name)
