"""What enters rnngrad is checked before it acts: stored files, configurations, command lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rnngrad.config import experiment
from rnngrad.launcher import plain
from rnngrad.parts import InputError
from rnngrad.runs import read_config, read_summary
from rnngrad.stored import NODE_LIMIT, TEXT_LIMIT, Unreadable

SAME_FOLDER = [HealthCheck.function_scoped_fixture]

# --- what is stored as YAML or JSON

# PyYAML does not bring back every line separator of Unicode; ${ would be an interpolation
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp"), exclude_characters="${"),
    max_size=20,
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)
LOOKS_LIKE = st.sampled_from(
    ["1e-3", "1:30", "2020-01-01", "null", "~", "yes", "<<", "=", ".nan", "0x1F", "1_000", "!!str"]
)


@settings(suppress_health_check=SAME_FOLDER, max_examples=300)
@given(tree=st.dictionaries(TEXTS | LOOKS_LIKE, PLAIN | LOOKS_LIKE, max_size=6))
def test_a_configuration_comes_back_as_hydra_has_stored_it(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    assume("name" not in repr(tree))  # of a part, which must be a text
    stored = OmegaConf.to_yaml(OmegaConf.create(tree))
    path = tmp_path / "config.yaml"
    path.write_text(stored, encoding="utf-8", newline="")
    assert read_config(path) == tree


NASTY_YAML = {
    "empty": b"",
    "a list": b"- 1\n",
    "a number": b"3\n",
    "a key that is a number": b"1: 2\n",
    "a key twice": b"seed: 1\nseed: 2\n",
    "a key twice inside": b"cell: {name: rnn, name: gru}\n",
    "an alias": b"a: &a [x, x]\nb: [*a, *a]\n",
    "an alias of itself": b"a: &a [*a]\n",
    "a tag of Python": b"a: !!python/object/apply:os.system [touch canary]\n",
    "a tag of Python as a name": b"a: !!python/name:os.system\n",
    "a tag": b"a: !mine 3\n",
    "a tag of a known type": b"a: !!float 3\n",
    "a tag under another name": b"%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!name:os.system\n",
    "not UTF-8": b"a: \xff\n",
    "UTF-16": "a: 1\n".encode("utf-16"),
    "a NUL": b"a: \0\n",
    "an escape": b"a: \x1b[2J\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "an open bracket": b"a: [1, 2\n",
    "a tab": b"\ta: 1\n",
    "a list as a key": b"? [a]\n: 1\n",
    "deep brackets": b"a: " + b"[" * 100_000,
    "deep blocks": b"- " * 100_000,
    "deep keys": b"? " * 100_000,
    "many values": b"a: [" + b"0," * (NODE_LIMIT + 1) + b"0]\n",
    "many empty lists": b"a: [" + b"[]," * 100_000 + b"[]]\n",
    "a long integer": b"a: " + b"7" * 100_000,
    "a long sexagesimal": b"a: 1" + b":1" * 200_000,
    "too much": b"#" * (TEXT_LIMIT + 1),
}
NASTY_JSON = {
    "empty": b"",
    "a list": b"[1]",
    "half": b'{"status": "comp',
    "a key twice": b'{"a": 1, "a": 2}',
    "NaN": b'{"loss": NaN}',
    "an infinite number": b'{"loss": 1e999}',
    "a long integer": b'{"a": ' + b"7" * 5000 + b"}",
    "deep brackets": b'{"a": ' + b"[" * 100_000,
    "deep": b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a NUL": b'{"a": 1}\0',
    "too much": b" " * (TEXT_LIMIT + 1),
}


@pytest.mark.parametrize("content", NASTY_YAML.values(), ids=NASTY_YAML)
def test_a_configuration_that_no_run_writes_is_one_line(content: bytes, tmp_path: Path) -> None:
    _check_refused(read_config, tmp_path / "config.yaml", content)


@pytest.mark.parametrize("content", NASTY_JSON.values(), ids=NASTY_JSON)
def test_a_summary_that_no_run_writes_is_one_line(content: bytes, tmp_path: Path) -> None:
    _check_refused(read_summary, tmp_path / "summary.json", content)


def _check_refused(read: Any, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(Unreadable) as refused:
        read(path)
    said = str(refused.value)
    assert said.startswith(f"{path}: ") and said.isprintable() and len(said) <= 500


def test_editors_marks_and_line_ends_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(b"\xef\xbb\xbfseed: 1\r\ntask:\r\n  name: copy\r\n")
    assert read_config(path) == {"seed": 1, "task": {"name": "copy"}}
    path.write_bytes(b'\xef\xbb\xbf{"steps": 1}\r\n')
    assert read_summary(path)["steps"] == 1


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe", "device", "sparse"])
@pytest.mark.parametrize("read", [read_config, read_summary])
def test_what_is_no_file_of_a_runs_size_is_not_read(kind: str, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "stored"
    (tmp_path / "secret").write_text("{}")
    if kind == "link":
        path.symlink_to(tmp_path / "secret")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(Unreadable):
        read(path)


def test_a_folder_of_stored_settings_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / ".hydra").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unreadable, match="symbolic link"):
        read_config(tmp_path / ".hydra" / "config.yaml")


# --- configurations


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


REFUSED: list[tuple[Any, Any, str]] = [
    ("trainer.steps", "\x1b[2J\n", "trainer.steps= [2J : must be an integer >= 1"),
    ("trainer.steps", 10**5000, "trainer.steps=(int): must be an integer >= 1"),
    ("trainer.steps", _nested(5000), "trainer.steps=(list): must be an integer >= 1"),
    ("trainer.\n", 1, "trainer. =1: no such key"),
    ("trainer." + "x" * 100_000, 1, "...=1: no such key"),
    (3, 1, "3=1: no such key"),
    (None, 1, "null=1: no such key"),
    ("clip.max_norm", 10**400, "clip.max_norm=1000000000000000000000000000000000000000000000000"),
    ("optim.lr", 1e39, "optim.lr=1e+39: must be a finite number > 0 that float32 holds"),
    ("cell.forget_bias", -1e39, "cell.forget_bias=-1e+39: must be a finite number that float32"),
    ("device", "privateuseone", "device=privateuseone: is not a device that this torch"),
    ("device", "hpu", "device=hpu: is not a device that this torch can use; cpu is"),
    ("device", "cpu\0", "device=cpu : is not a device that this torch can use; cpu is"),
]


@pytest.mark.parametrize(("key", "value", "says"), REFUSED, ids=[says for _, _, says in REFUSED])
def test_what_no_part_can_be_made_of_is_one_line(key: Any, value: Any, says: str) -> None:
    config = defaults()
    group, _, inner = str(key).partition(".")
    if inner:
        config[group][inner] = value
    else:
        config[key] = value
    with pytest.raises(InputError) as refused:
        experiment(config)
    said = str(refused.value)
    assert says in said and said.isprintable() and len(said) < 600


def defaults() -> dict[str, Any]:
    """The configuration of a command line without any words."""
    with initialize_config_module("rnngrad.conf", version_base="1.3"):
        return plain(compose("config"))
