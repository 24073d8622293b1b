"""The package is the same from a clone, a wheel and an sdist, and leaves one name behind."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the clone, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        text=True,
        cwd=out,
        env=os.environ | {"PYTHONWARNINGS": "default"},
    )
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel puts into site-packages."""
    (wheel,) = built.glob("*.whl")
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(where: Path, path: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=where,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_and_yaml_of_the_clone_and_one_name(installed: Path) -> None:
    def listed(folder: Path) -> set[str]:
        return {
            str(p.relative_to(folder))
            for p in folder.glob("**/*")
            if p.suffix in (".py", ".yaml", ".typed") and "__pycache__" not in p.parts
        }

    assert listed(installed / "rnngrad" / "tasks") == listed(ROOT / "tasks")
    assert listed(installed / "rnngrad" / "conf") == listed(ROOT / "conf")
    own = {n for n in listed(installed / "rnngrad") if not n.startswith(("tasks/", "conf/"))}
    assert own == listed(ROOT / "rnngrad")
    names = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert names == {"rnngrad", "hydra_plugins"}


@pytest.mark.parametrize("source", ["clone", "wheel"])
@pytest.mark.parametrize("where", ["outside", "in the clone"])
def test_tasks_and_conf_are_found(source: str, where: str, installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['rnngrad', '--cfg', 'job', 'task=copy']\n"
        "from rnngrad.task import TASKS\n"
        "import rnngrad, rnngrad.tasks.copy as copy\n"
        "assert TASKS.default('copy').__class__ is copy.Copy\n"
        "print(rnngrad.__file__)\n"
        "from rnngrad.__main__ import main\n"
        "main()\n"
    )
    path = ROOT if source == "clone" else installed
    out = python(tmp_path if where == "outside" else ROOT, path, code)
    assert "name: copy" in out
    if source == "wheel" and where == "outside":
        assert out.startswith(str(installed))


def test_tasks_are_importable_by_one_name_only(tmp_path: Path) -> None:
    code = "try: import tasks\nexcept ImportError as error: print(error)"
    assert "import rnngrad.tasks, not tasks" in python(tmp_path, ROOT, code)


def test_the_sdist_holds_what_a_developer_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "tasks/copy.py"} <= names
    assert {"conf/config.yaml", "docs/first_look.png", "CHANGELOG.md", "LICENSE"} <= names


def test_the_version_stands_in_one_place() -> None:
    import rnngrad

    assert f'version = "{rnngrad.__version__}"' not in (ROOT / "pyproject.toml").read_text()
    assert f"version: {rnngrad.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {rnngrad.__version__}" in (ROOT / "CHANGELOG.md").read_text()
