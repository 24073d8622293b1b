"""What the README and the docstrings show is run as it stands there."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import rnngrad
import rnngrad.tasks
from rnngrad.menu import menu

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(
    module.name
    for package in (rnngrad, rnngrad.tasks)
    for module in pkgutil.walk_packages(
        [str(Path(package.__file__).parent)] if package.__file__ else [], f"{package.__name__}."
    )
    if module.name != "rnngrad.__main__"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_doctests_and_modules_to_find_them_in() -> None:
    assert {"rnngrad.bptt", "rnngrad.nn", "rnngrad.parts", "rnngrad.tasks.copy"} <= set(MODULES)
    for name in ("rnngrad.bptt", "rnngrad.nn", "rnngrad.parts", "rnngrad.model"):
        assert doctest.testmod(importlib.import_module(name)).attempted > 0


def test_the_readmes_python_runs_as_it_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert out.startswith("tensor([") and "torch.Size([100, 8])" in out


def test_the_readmes_commands_run_with_the_part_it_adds(tmp_path: Path) -> None:
    """As typed, but for the length of training."""
    (tmp_path / "halve.py").write_text(next(b for b in blocks("python") if "Halve" in b))
    (tmp_path / "myconf" / "clip").mkdir(parents=True)
    (tmp_path / "myconf" / "clip" / "halve.yaml").write_text(blocks("yaml")[0])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    modules = {
        "rnngrad": "rnngrad",
        "rnngrad-report": "rnngrad.report",
        "rnngrad-reproduce": "rnngrad.reproduce",
    }
    ran = []
    for line in re.findall(r"^\$ (rnngrad\S* ?.*)$", README, re.M):
        program, *arguments = shlex.split(line)
        if program in ("rnngrad-check", "rnngrad-bench"):
            continue  # tests/test_check.py, tests/test_bench.py
        if program == "rnngrad" and arguments[0].startswith("resume="):
            arguments[1] = "trainer.steps=4"
        elif program == "rnngrad-reproduce" and arguments[0] != "--list":
            arguments += ["--seeds", "10"]  # too few for any verdict, so that it may fail
        elif program == "rnngrad":
            arguments += ["trainer.steps=2", "trainer.eval_size=2", "task.length=12"]
        done = subprocess.run(
            [sys.executable, "-m", modules[program], *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        judged = "partly" in done.stdout or "not reproduced" in done.stdout
        assert done.returncode == int(judged), f"{line}\n{done.stdout}{done.stderr}"
        ran.append(program)
    assert ran.count("rnngrad") == 10 and "rnngrad-report" in ran
    # two of the second sweep's eight are runs of the first one, which it finds finished
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 23 + 8 - 2
    assert (tmp_path / "runs" / "report" / "index.html").exists()


def test_the_python_of_the_other_pages_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            exec(compile(block, page.name, "exec"), {})
    assert "% of steps" in capsys.readouterr().out


def test_the_menu_says_what_the_code_does() -> None:
    """Entry by entry; one that is new may wait for `make docs`, which `make lint` insists on."""
    written = entries((ROOT / "docs" / "menu.md").read_text(encoding="utf-8"))
    true = entries(menu())
    for title, text in written.items():
        assert true.get(title) == text, f"{title}: make docs"
    if new := true.keys() - written.keys():
        pytest.skip(f"docs/menu.md has not yet {', '.join(new)}: make docs")


def entries(page: str) -> dict[str, str]:
    parts = re.split(r"^(###? .*)$", page, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_entry_of_the_menu_has_a_description_and_a_source() -> None:
    for title, text in entries(menu()).items():
        if re.match(r"### `\w+=(?!none)", title):
            assert len(text.strip().splitlines()[0]) > 3, title
            assert "Source: " in text, title


def test_every_make_target_and_file_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^\$ )make ([a-z-]+)", README, re.M))
    assert {"run", "test", "test-slow", "lint"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile
    for name in re.findall(r"\[(?:[^]]*)\]\((?!http)([^)]+)\)", README):
        path, _, place = name.partition("#")
        assert (ROOT / path).exists(), name
        assert not place or f'id="{place}"' in (ROOT / path).read_text(encoding="utf-8"), name
    tree = next(b for b in blocks("text") if b.startswith("rnngrad/"))
    for name in re.findall(r"[\w/]+\.py\b", tree):
        assert (ROOT / "rnngrad" / name).exists(), name


def test_the_tree_names_every_module_of_the_package() -> None:
    tree = next(b for b in blocks("text") if b.startswith("rnngrad/"))
    for path in (ROOT / "rnngrad").iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            assert path.name in tree, path.name


def test_ci_does_what_the_readme_tells_a_newcomer() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "$ make test" in README.splitlines()
