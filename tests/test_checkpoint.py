"""Checkpoints: bits that come back, faults that change nothing, and input that is refused."""

import errno
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rnngrad import checkpoint
from rnngrad.checkpoint import (
    DTYPES,
    MANIFEST,
    STATE,
    TENSORS,
    AsyncCheckpointer,
    best_step,
    load,
    rewind,
    save,
)
from rnngrad.parts import InputError, NothingUsable
from rnngrad.stored import one_line
from tests.faults import (
    Faults,
    PowerCut,
    content,
    cut_power,
    forge,
    safetensors_file,
    same,
)

ROOT = Path(__file__).parent.parent
ONE = {"w": torch.tensor([1.5, -0.0, math.nan])}
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test here cuts the power, but in a simulation that sees what would have been synced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def saved(directory: Path, *steps: int, **options: Any) -> list[Path]:
    return [save(directory, step, ONE, {"step": step}, **options) for step in steps]


def steps(directory: Path) -> list[int]:
    """Of the checkpoints there; nothing else may be there."""
    names = sorted(os.listdir(directory))
    assert all(name.startswith("step-") for name in names), names
    return sorted(int(name.removeprefix("step-").partition(".")[0]) for name in names)


def why(directory: Path, step: int | None = None) -> str:
    """Why nothing is usable, in one line."""
    with pytest.raises(NothingUsable) as caught:
        load(directory, step)
    text = str(caught.value)
    assert text.isprintable()
    assert str(directory) in text
    return text


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# What goes in comes out


@st.composite
def any_tensor(draw: st.DrawFn) -> Tensor:
    """Any bits in any dtype and shape, also as a part, a transpose or a repetition of memory."""
    dtype = draw(st.sampled_from(sorted(DTYPES, key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    tensor = (flat.view(dtype) if data else flat.to(dtype)).reshape(shape)
    if tensor.dim() >= 2 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[:: draw(st.integers(1, 3))]
    return tensor.unsqueeze(0).expand(2, *tensor.shape) if draw(st.booleans()) else tensor


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5), any_tensor(), max_size=4), st.booleans())
def test_every_bit_of_every_tensor_comes_back(tensors: dict[str, Tensor], shared: bool) -> None:
    if shared:
        tensors |= {f"{name} again": tensor for name, tensor in tensors.items()}
        tensors |= {f"{n} in part": t[:1] for n, t in tensors.items() if t.dim()}
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), 3, tensors, {})
        loaded = load(Path(folder))
        assert same(loaded.tensors, tensors)
        assert (loaded.step, loaded.path, loaded.skipped) == (3, path, [])
        addresses = [t.data_ptr() for t in loaded.tensors.values() if t.numel()]
        assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)], ids=str)
def test_every_dtype_and_shape_comes_back(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensor = torch.ones(shape).to(dtype)
    save(tmp_path, 0, {"t": tensor}, {})
    assert same(load(tmp_path).tensors, {"t": tensor})


bits = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", n.to_bytes(8, "big"))[0])
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | bits
    | st.sampled_from([-0.0, math.nan, -math.nan, math.inf, -math.inf, 5e-324, 2**53 + 1])
    | st.integers(-(2**5000), 2**5000)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["$float", "$int", "$$"]), inner)
    ),
    max_leaves=12,
)


def identical(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_every_value_comes_back_with_its_type_and_bits(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), 3, {}, values)
        assert identical(load(Path(folder)).values, values)
        text = (path / STATE).read_text("ascii")
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_signalling_nan_keeps_its_payload(tmp_path: Path) -> None:
    signalling = struct.unpack(">d", bytes.fromhex("fff0000000000123"))[0]
    save(tmp_path, 1, {}, {"x": signalling})
    assert struct.pack(">d", load(tmp_path).values["x"]).hex() == "fff0000000000123"


def test_what_looks_like_a_tag_comes_back_as_the_mapping_it_was(tmp_path: Path) -> None:
    values = {"$float": "7ff8000000000000", "x": {"$int": "0x1"}, "$$float": {"$": [math.inf]}}
    save(tmp_path, 1, {}, values)
    assert identical(load(tmp_path).values, values)


def test_equal_contents_make_equal_bytes_in_whatever_order(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int64), "c": torch.ones(3)}
    inner = {"b": 1, "a": math.nan}
    values: dict[str, Any] = {"y": inner, "x": [1, 2]}
    backwards = {"x": [1, 2], "y": dict(reversed(inner.items()))}
    one = save(tmp_path / "one", 7, tensors, values)
    two = save(tmp_path / "two", 7, dict(reversed(tensors.items())), backwards)
    for name in (TENSORS, STATE, MANIFEST):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": {"b": (1, 2)}}, "values.a.b: is a tuple, which would not come back as one"),
        ({"a": [0, torch.ones(1)]}, "values.a[1]: is a Tensor, which would not come back as one"),
        ({"a": {1: 2}}, "values.a: has a key that is not a text that UTF-8 can write"),
        ({"a": "\ud83d\ude00"}, r"values.a='\ud83d\ude00': is not a text that UTF-8 can write"),
        ({"a": b"x"}, "values.a: is a bytes, which would not come back as one"),
        ({"a": 1j}, "values.a: is a complex, which would not come back as one"),
    ],
)
def test_a_value_that_would_not_come_back_is_refused_at_once(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        save(tmp_path / "new", 1, {}, values)
    assert str(caught.value) == message
    assert not (tmp_path / "new").exists()


def test_values_nested_without_end_are_refused(tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    values["self"] = values
    with pytest.raises(InputError, match="is nested in more than 64 levels"):
        save(tmp_path, 1, {}, values)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("__metadata__", torch.ones(1)),
        ("\ud800", torch.ones(1)),
        ("t", torch.ones(2, 2).to_sparse()),
        ("t", torch.ones(2, device="meta")),
        ("t", torch.ones(2, dtype=torch.complex128)),
        ("t", torch.ones(2).to(torch.float8_e8m0fnu)),
    ],
)
def test_a_tensor_that_would_not_come_back_is_refused_at_once(
    name: str, tensor: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(InputError):
        save(tmp_path / "new", 1, {name: tensor}, {})
    assert not (tmp_path / "new").exists()


def test_nothing_is_saved_that_is_too_large_to_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "STATE_LIMIT", 100)
    monkeypatch.setattr(checkpoint, "HEADER_LIMIT", 1000)
    with pytest.raises(InputError, match="values: have 109 bytes; 100 are allowed"):
        save(tmp_path, 1, {}, {"x": "x" * 100})
    with pytest.raises(InputError, match="50 tensors are too many for one file"):
        save(tmp_path, 1, {str(i): torch.ones(1) for i in range(50)}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", [-1, 10**18, True, 1.0, "1"])
def test_a_step_that_is_no_count_is_refused(step: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step=.*: must be an integer >= 0 and < 10\^18"):
        save(tmp_path, step, {}, {})


# Which stay, and which is taken


@pytest.mark.parametrize("keep", [1, -1, True, 2.0, None])
def test_keeping_one_alone_is_refused(keep: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep=.*: must be an integer >= 2, or 0 to keep all"):
        save(tmp_path / "new", 1, {}, {}, keep=keep)
    with pytest.raises(InputError, match="keep="):
        AsyncCheckpointer(tmp_path / "new", keep=keep)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("keep", "stay"), [(2, [11, 12]), (5, [8, 9, 10, 11, 12]), (0, list(range(1, 13)))]
)
def test_the_last_ones_stay(keep: int, stay: list[int], tmp_path: Path) -> None:
    saved(tmp_path, *range(1, 13), keep=keep)
    assert steps(tmp_path) == stay


def test_the_best_stays_until_a_later_one_is_better(tmp_path: Path) -> None:
    assert best_step(saved(tmp_path, 1)[0].parent) is None
    saved(tmp_path, 3, best=True)
    saved(tmp_path, 4, 5, 6)
    assert (steps(tmp_path), best_step(tmp_path)) == ([3, 5, 6], 3)
    saved(tmp_path, 7, best=True)
    assert (steps(tmp_path), best_step(tmp_path)) == ([3, 6, 7], 7)  # 7 may yet be taken back
    saved(tmp_path, 8, 9)
    assert (steps(tmp_path), best_step(tmp_path)) == ([7, 8, 9], 7)


def test_the_best_saved_once_more_is_still_the_best(tmp_path: Path) -> None:
    saved(tmp_path, 3, best=True)
    saved(tmp_path, 3)
    assert best_step(tmp_path) == 3


@pytest.mark.parametrize("times", [(2e9, 1e9), (1e9, 1e9)], ids=["jumped back", "stood still"])
@pytest.mark.parametrize("before", [9, 99, 999_999_999])
def test_order_is_by_number_not_by_text_or_clock(
    before: int, times: tuple[float, float], tmp_path: Path
) -> None:
    older, newer = saved(tmp_path, before, before + 1)
    for path, time in zip((older, newer), times, strict=True):
        for file in (*path.iterdir(), path):
            os.utime(file, (time, time))
    assert load(tmp_path).step == before + 1
    saved(tmp_path, before + 2)
    assert steps(tmp_path) == [before + 1, before + 2]


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    for x in range(12):  # step-000000005.9 < step-000000005.10
        path = save(tmp_path, 5, {"x": torch.tensor(x)}, {"x": x})
        loaded = load(tmp_path)
        assert (loaded.path, loaded.values, loaded.tensors["x"].item()) == (path, {"x": x}, x)
        assert load(tmp_path, 5).values == {"x": x}
        assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_bears_a_step_s_name_and_is_no_checkpoint_is_replaced(
    kind: str, tmp_path: Path
) -> None:
    directory, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    saved(directory, 1)
    (elsewhere / "precious").mkdir(parents=True)
    path = directory / "step-000000002"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("junk")
    else:
        path.symlink_to(elsewhere)
    assert load(directory).step == 1
    saved(directory, 2)
    assert load(directory).step == 2
    saved(directory, 3)
    assert len(os.listdir(directory)) == 2
    assert (elsewhere / "precious").exists()


def test_what_is_broken_does_not_count_towards_the_last_ones(tmp_path: Path) -> None:
    _, _, broken = saved(tmp_path, 1, 2, 3, keep=5)
    (broken / TENSORS).write_bytes(b"")
    saved(tmp_path, 4)
    assert steps(tmp_path) == [2, 3, 4]
    saved(tmp_path, 5)
    assert steps(tmp_path) == [4, 5]


def test_what_was_saved_stays_though_there_are_later_ones(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, keep=0)
    saved(tmp_path, 11)
    saved(tmp_path, 12)
    assert steps(tmp_path) == [11, 12, 20, 30]


def test_a_run_that_goes_back_leaves_no_later_ones(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, 30, keep=0)
    rewind(tmp_path, 10)
    assert steps(tmp_path) == [10]
    rewind(tmp_path, 10)
    assert load(tmp_path).step == 10


def test_names_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    names = {"step-9", "step-0000000009", "step-000000009.0", "step-000000009.x", "best", "step-١"}
    for name in names:
        (tmp_path / name).mkdir()
    assert "no checkpoint in it" in why(tmp_path)
    saved(tmp_path, 10, 11, 12)
    assert set(os.listdir(tmp_path)) == names | {"step-000000011", "step-000000012"}


def test_a_link_is_removed_itself_never_what_it_points_to(tmp_path: Path) -> None:
    directory, precious = tmp_path / "checkpoints", tmp_path / "precious"
    directory.mkdir()
    precious.mkdir()
    (precious / "data").write_text("x")
    gone = dead_process()
    links = ["step-000000001", "step-000000002", f".step-000000003.tmp-{gone}"]
    for name, target in zip(links, [precious, directory / "loop", precious], strict=True):
        (directory / name).symlink_to(target)
    (directory / "loop").symlink_to(directory / "step-000000002")
    saved(directory, 4, 5)
    assert sorted(os.listdir(directory)) == ["loop", "step-000000004", "step-000000005"]
    assert (precious / "data").read_text() == "x"


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_dead_process_began_is_removed_and_a_live_one_s_is_left(tmp_path: Path) -> None:
    gone = tmp_path / f".step-000000009.tmp-{dead_process()}"
    no_such = tmp_path / ".step-000000009.2.tmp-9999999999"
    own = tmp_path / f".step-000000009.1.tmp-{os.getpid()}"
    live = tmp_path / f".step-000000009.tmp-{os.getppid()}"
    for folder in (gone, no_such, own, live):
        folder.mkdir()
        (folder / TENSORS).write_bytes(b"half")
    saved(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {live.name, "step-000000001"}
    assert load(tmp_path).step == 1


@pytest.mark.parametrize("temporary", ["/dev/full", "/dev/shm", "/proc/self", "/nowhere"])
def test_the_temporary_directory_does_not_matter(
    temporary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", temporary)
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("gettempdir", "mkstemp", "mkdtemp"):
        monkeypatch.setattr(tempfile, name, lambda *_, **__: pytest.fail("nobody asked for one"))
    saved(tmp_path, 1)
    assert load(tmp_path).step == 1


# What is on the disk is not what was written

Damage = Callable[[Path], object]


def cut(share: float, bytes_off: int = 0) -> Damage:
    def damage(path: Path) -> None:
        os.truncate(path, int(path.stat().st_size * share) - bytes_off)

    return damage


def flip(path: Path, position: int = 3, bit: int = 0) -> None:
    """In place, as a disk does it; to write a file anew costs seconds over thousands of flips."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def instead(make: Damage) -> Damage:
    def damage(path: Path) -> None:
        path.rename(path.parent.parent / "moved away")
        make(path)

    return damage


DAMAGES: dict[str, Damage] = {
    "cut at 0": cut(0),
    "cut at 1": cut(0, -1),
    "cut in half": cut(0.5),
    "last byte gone": cut(1, 1),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "a bit flipped": flip,
    "missing": instead(lambda path: None),
    "a folder": instead(lambda path: path.mkdir()),
    "a pipe": instead(os.mkfifo),
    "a dangling link": instead(lambda path: path.symlink_to("nowhere")),
    "a looping link": instead(lambda path: path.symlink_to(path.name)),
    "a link to what was there": instead(lambda path: path.symlink_to("../moved away")),
    "another step's": lambda path: path.write_bytes(
        (path.parent.parent / "step-000000009" / path.name).read_bytes()
    ),
}


@pytest.mark.parametrize("file", [TENSORS, STATE, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_and_named(damage: str, file: str, tmp_path: Path) -> None:
    _, newest = (save(tmp_path, s, {"s": torch.tensor(float(s))}, {"s": s}) for s in (9, 10))
    DAMAGES[damage](newest / file)
    loaded = load(tmp_path)
    assert (loaded.step, loaded.values) == (9, {"s": 9})
    (reason,) = loaded.skipped
    assert reason.startswith(f"{newest / file}: ") and reason.isprintable()
    assert why(tmp_path, 10) == f"no usable checkpoint: {reason}"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("missing", None),
        ("a folder", "MANIFEST.json: is missing"),
        ("a pipe", ": is not a folder"),
        ("a dangling link", ": is a symbolic link"),
        ("a looping link", ": is a symbolic link"),
        ("a link to what was there", ": is a symbolic link"),
    ],
)
def test_a_newest_that_is_no_folder_is_passed_over(
    damage: str, reason: str | None, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoints"
    _, newest = saved(directory, 9, 10)
    DAMAGES[damage](newest)
    loaded = load(directory)
    assert loaded.step == 9
    assert [text.endswith(reason) for text in loaded.skipped] == ([] if reason is None else [True])


def assert_every_flipped_bit_is_seen(directory: Path) -> int:
    """Flips each bit of the newest checkpoint in turn; the older one must be taken every time."""
    older, newest = saved(directory, 9, 10)
    flips = 0
    for file in (TENSORS, STATE, MANIFEST):
        for position in range((newest / file).stat().st_size):
            for bit in range(8):
                flip(newest / file, position, bit)
                assert load(directory).path == older, (file, position, bit)
                flip(newest / file, position, bit)
                flips += 1
    assert load(directory).path == newest
    return flips


def test_every_flipped_bit_of_every_file_is_seen(tmp_path: Path) -> None:
    assert assert_every_flipped_bit_is_seen(tmp_path) > 3000


def test_without_hashes_a_flipped_bit_goes_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_same", lambda found, stored: True)
    with pytest.raises(AssertionError, match=TENSORS):
        assert_every_flipped_bit_is_seen(tmp_path)


@pytest.mark.parametrize("call", ["open", "lstat", "fstat"])
def test_a_file_that_cannot_be_read_is_passed_over_and_named(call: str, tmp_path: Path) -> None:
    saved(tmp_path, 9, 10)
    with Faults()() as record:
        load(tmp_path, 10)
    names = [name for name, _ in record.calls]
    with Faults(names.index(call), errno.EACCES)():
        loaded = load(tmp_path)
    assert loaded.step == 9
    assert loaded.skipped[0].endswith("Permission denied")


def test_where_all_are_broken_each_is_named_and_nothing_is_removed(tmp_path: Path) -> None:
    paths = saved(tmp_path, 1, 2, 3, keep=0)
    (paths[0] / STATE).unlink()
    flip(paths[1] / TENSORS)
    cut(0.5)(paths[2] / MANIFEST)
    before = sorted(tmp_path.glob("**/*"))
    text = why(tmp_path)
    assert f"{paths[0] / STATE}: is missing" in text
    assert f"{paths[1] / TENSORS}: its sha256 is not the one in MANIFEST.json" in text
    assert f"{paths[2] / MANIFEST}: is not the JSON that is expected here" in text
    assert sorted(tmp_path.glob("**/*")) == before


def test_of_a_hundred_that_are_broken_the_line_says_how_many_and_names_the_newest(
    tmp_path: Path,
) -> None:
    for path in saved(tmp_path, *range(1, 101), keep=0):
        (path / STATE).unlink()
    text = why(tmp_path)
    assert text == one_line(text)  # so that nothing of it is cut off
    newest = "; ".join(f"step-{step:09}/{STATE}: is missing" for step in (100, 99, 98))
    assert text.endswith(f"none of the 100 in {tmp_path}, of which the newest: {newest}")


def test_a_directory_without_checkpoints_says_what_is_the_matter(tmp_path: Path) -> None:
    assert why(tmp_path / "typo") == f"{tmp_path / 'typo'}: No such file or directory"
    assert not (tmp_path / "typo").exists()
    (tmp_path / "file").write_text("")
    assert why(tmp_path / "file") == f"{tmp_path / 'file'}: Not a directory"
    (tmp_path / "empty").mkdir()
    assert why(tmp_path / "empty") == f"{tmp_path / 'empty'}: no checkpoint in it"
    saved(tmp_path / "some", 1, 2)
    assert why(tmp_path / "some", 7).endswith("no checkpoint of step 7; there are 1, 2")


# The system says no


def prepared(directory: Path) -> None:
    """Checkpoints 1 (the best), 2 and 3, and what a dead process left."""
    saved(directory, 1, best=True)
    saved(directory, 2, 3)
    stale = directory / f".step-000000009.tmp-{dead_process()}"
    stale.mkdir()
    (stale / TENSORS).write_bytes(b"half")


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared") / "checkpoints"
    prepared(directory)
    return directory


def save_4(directory: Path, asynchronous: bool = False) -> None:
    if not asynchronous:
        save(directory, 4, ONE, {"step": 4})
        return
    with AsyncCheckpointer(directory) as checkpointer:
        checkpointer.save(4, ONE, {"step": 4})


def every_fault(
    before: Path, tmp_path: Path, error: int | BaseException
) -> Iterator[tuple[Path, Faults]]:
    """A copy of ``before`` for each system call of a save, and that call's failure."""
    shutil.copytree(before, tmp_path / "all", symlinks=True, copy_function=os.link)
    with Faults()() as record:
        save_4(tmp_path / "all")
    done = {name for name, _ in record.calls}
    assert {"open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"} <= done
    for number in range(len(record.calls)):
        directory = tmp_path / str(number)
        shutil.copytree(before, directory, symlinks=True, copy_function=os.link)
        yield directory, Faults(number, error)


def whole(directory: Path, *expected: int) -> None:
    for step in expected:
        loaded = load(directory, step)
        assert same(loaded.tensors, ONE) and loaded.values == {"step": step}


@pytest.mark.parametrize(
    ("code", "asynchronous"),
    [
        (errno.ENOSPC, False),
        (errno.ENOSPC, True),
        (errno.EIO, False),
        (errno.EROFS, False),
        (errno.EACCES, False),
    ],
)
def test_a_call_that_fails_is_told_once_and_leaves_what_was_there(
    code: int,
    asynchronous: bool,
    prepared_once: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = quiet = 0
    for directory, faults in every_fault(prepared_once, tmp_path, code):
        caplog.clear()
        try:
            with faults():
                save_4(directory, asynchronous)
        except OSError as error:
            told += 1
            assert error.errno == code
            assert str(directory) in str(error) and str(error).isprintable()
            assert not list(directory.glob(".step-000000004*"))
            whole(directory, 1, 2, 3)
            assert load(directory).step in (3, 4)
        else:  # it was in tidying up, which can wait
            quiet += 1
            assert str(directory) in caplog.text or faults.failed == "kill"
            whole(directory, 1, 3, 4)
        assert load(directory).skipped == []
        last = load(directory).step
        saved(directory, 5)
        assert steps(directory) == [1, last, 5]
        assert best_step(directory) == 1
    assert told > 15 and quiet > 15


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in a thread"])
@pytest.mark.parametrize(
    "place", ["safetensors.torch.save", "json.dumps", "hashlib.sha256", "os.write", "os.fsync"]
)
def test_what_is_raised_in_writing_out_the_state_leaves_nothing_of_it(
    place: str, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Surprise(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise Surprise

    saved(tmp_path, 1, 2, 3)
    before = sorted(tmp_path.glob("**/*"))
    with monkeypatch.context() as patch, pytest.raises(Surprise):
        patch.setattr(place, fail)
        save_4(tmp_path, asynchronous)
    assert sorted(tmp_path.glob("**/*")) == before
    whole(tmp_path, 2, 3)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in a thread"])
@pytest.mark.parametrize("size", [1, 12_345, 100_000])
def test_a_file_that_the_system_lets_grow_no_further_leaves_what_was_there(
    size: int, asynchronous: bool, tmp_path: Path
) -> None:
    """No simulation: the kernel takes a part of the bytes, and refuses the rest."""
    tensors, values = content(1)
    save(tmp_path, 1, tensors, values)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            if asynchronous:
                with AsyncCheckpointer(tmp_path) as checkpointer:
                    checkpointer.save(2, *content(2))
            else:
                save(tmp_path, 2, *content(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert steps(tmp_path) == [1] and same(load(tmp_path).tensors, tensors)
    save(tmp_path, 2, *content(2))
    assert load(tmp_path).values == content(2)[1]


def test_an_interrupt_in_any_call_leaves_what_was_there(
    prepared_once: Path, tmp_path: Path
) -> None:
    for directory, faults in every_fault(prepared_once, tmp_path, KeyboardInterrupt()):
        with pytest.raises(KeyboardInterrupt), faults():
            save_4(directory)
        whole(directory, 1, 3)
        assert load(directory).step in (3, 4)
        last = load(directory).step
        saved(directory, 5)
        assert steps(directory) == [1, last, 5]
        assert best_step(directory) == 1


def after_power_cut(directory: Path, faults: Faults) -> Iterator[Path]:
    """Copies of ``directory`` without what was not synced, or without a part of it."""
    for data, names in ((False, False), (True, False), (False, True), (True, True)):
        left = directory.with_name(f"{directory.name}-{data}-{names}")
        shutil.copytree(directory, left, symlinks=True, copy_function=os.link)
        cut_power(faults.calls, directory, left, data=data, names=names)
        yield left


def test_a_power_cut_in_a_save_leaves_what_was_there(prepared_once: Path, tmp_path: Path) -> None:
    """After every system call what was not synced is lost; older ones go once the new is safe."""
    tidied = 0
    for directory, faults in every_fault(prepared_once, tmp_path, PowerCut()):
        with pytest.raises(PowerCut), faults():
            save_4(directory)
        safe = not (directory / "step-000000002").exists()
        tidied += safe
        for left in after_power_cut(directory, faults):
            assert load(left).step in ((4,) if safe else (3, 4)), (faults.calls[-1], left)
            whole(left, 1, 3)
            assert best_step(left) == 1
            saved(left, 5)
            assert load(left).step == 5
    assert tidied > 5


def outlives_power_cuts(directory: Path, faults: Faults) -> bool:
    """Whether a first checkpoint that ``save`` has returned of is there after every power cut."""
    with faults():
        save(directory / "checkpoints", 1, ONE, {"step": 1})
    for left in after_power_cut(directory, faults):
        try:
            whole(left / "checkpoints", 1)
        except NothingUsable:
            return False
    return True


def test_what_save_has_returned_of_outlives_a_power_cut(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert outlives_power_cuts(tmp_path / "run", Faults())


@pytest.mark.parametrize("number", range(6))
def test_none_of_the_syncs_can_be_left_out(number: int, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    faults = Faults(forgotten=number)
    assert not outlives_power_cuts(tmp_path / "run", faults)
    assert (faults.count("fsync"), faults.count("forgotten fsync")) == (5, 1)


def test_a_write_that_takes_a_part_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    saved(tmp_path, 1)
    monkeypatch.undo()
    whole(tmp_path, 1)


def test_a_file_system_that_cannot_sync_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    saved(tmp_path, 1)
    whole(tmp_path, 1)


def test_a_vanished_run_directory_is_told_and_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoints"):
        saved(tmp_path / "run" / "checkpoints", 1)
    assert os.listdir(tmp_path) == []


# Killed


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in a thread"])
@pytest.mark.parametrize(
    ("kills", "disk"), [(25, False), pytest.param(100, True, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_it_leaves_the_last_or_the_one_being_saved(
    kills: int, disk: bool, asynchronous: bool, tmp_path: Path
) -> None:
    done = json.loads(
        python(
            "import json; from pathlib import Path; from tests.faults import kill_savers\n"
            f"done = kill_savers(Path({str(tmp_path)!r}), {kills}, seed=1, "
            f"asynchronous={asynchronous}, disk={disk})\n"
            "print(json.dumps(done))"
        )
    )
    assert done["torn"] >= kills // 5  # it was hit in the middle of saving
    assert done["last"] >= kills // 4


# In a thread


def test_what_is_trained_on_may_change_while_it_is_saved(tmp_path: Path) -> None:
    tensors, values = {"w": torch.zeros(1000)}, {"list": [0]}
    with AsyncCheckpointer(tmp_path, keep=0) as checkpointer:
        for step in range(1, 20):
            tensors["w"].fill_(step)
            values["list"][0] = step
            checkpointer.save(step, tensors, values)
            tensors["w"].fill_(-1)
            values["list"][0] = -1
    for step in range(1, 20):
        loaded = load(tmp_path, step)
        assert loaded.values == {"list": [step]}
        assert loaded.tensors["w"].eq(step).all()


def test_a_thread_s_failure_is_told_once_and_the_next_save_goes_on(tmp_path: Path) -> None:
    checkpointer = AsyncCheckpointer(tmp_path)
    checkpointer.save(1, ONE, {"step": 1})
    assert checkpointer.wait() == tmp_path / "step-000000001"
    assert checkpointer.wait() is None
    with Faults()() as record:
        save(tmp_path / "like it", 2, ONE, {"step": 2})
    shutil.rmtree(tmp_path / "like it")
    writes = [number for number, (name, _) in enumerate(record.calls) if name == "write"]
    with Faults(writes[1], errno.ENOSPC)():
        checkpointer.save(2, ONE, {"step": 2})
        with pytest.raises(OSError, match="No space left on device"):
            checkpointer.save(3, ONE, {"step": 3})
    checkpointer.save(4, ONE, {"step": 4})
    checkpointer.wait()
    assert steps(tmp_path) == [1, 4]


def test_a_thread_s_failure_does_not_hide_the_error_that_ends_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Faults(0, errno.ENOSPC)(), pytest.raises(ZeroDivisionError):
        with AsyncCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(1, ONE, {})
            1 / 0  # noqa: B018
    assert "checkpoint not written: [Errno 28] No space left on device" in caplog.text


def test_a_process_that_ends_without_waiting_still_saves(tmp_path: Path) -> None:
    python(
        "import torch; from pathlib import Path; from rnngrad.checkpoint import AsyncCheckpointer\n"
        f"checkpointer = AsyncCheckpointer(Path({str(tmp_path)!r}))\n"
        "checkpointer.save(1, {'w': torch.ones(1_000_000)}, {})"
    )
    assert load(tmp_path).tensors["w"].sum() == 1_000_000


# Forged


def canary_pickle(canary: Path) -> bytes:
    """Makes the folder ``canary`` when it is unpickled."""
    return f"cposix\nmkdir\n(S'{canary}'\ntR.".encode()


def change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree.update(changes)


def rename_file(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["files"].update({name: tree["files"].pop(TENSORS)})


def claim(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["files"][name].update(changes)


GOOD = safetensors_file({"a": ENTRY}, b"\0\0\x80\x3f")
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2)
NOT_OURS = "MANIFEST.json: is not the manifest of step 5"
NOT_JSON = "is not the JSON that is expected here"

FORGERIES: dict[str, tuple[dict[str, Any], str]] = {
    "a header of 2^63 bytes": (
        {"tensors": (2**63).to_bytes(8, "little") + b"{}"},
        "header is said",
    ),
    "a header longer than the file": ({"tensors": b"\x09" + b"\0" * 7 + b"{}"}, "header is said"),
    "an empty file": ({"tensors": b""}, "its header is said to have 0 bytes"),
    "three bytes": ({"tensors": b"\0\0\0"}, "its header is said to have 0 bytes"),
    "no JSON in the header": ({"tensors": safetensors_file(b"{'a'}")}, NOT_JSON),
    "overlapping tensors": (
        {"tensors": safetensors_file({"a": ENTRY, "b": ENTRY}, b"1234")},
        "is not a safetensors file",
    ),
    "a tensor twice": ({"tensors": safetensors_file(TWICE, b"1234")}, "a key is there twice"),
    "bytes of no tensor": ({"tensors": GOOD + b"x"}, "is not a safetensors file"),
    "a tensor beyond the end": ({"tensors": GOOD[:-1]}, "is not a safetensors file"),
    "a huge shape": (
        {"tensors": safetensors_file({"a": ENTRY | {"shape": [2**40, 2**40]}}, b"1234")},
        "is not a safetensors file",
    ),
    "a huge empty shape": (
        {
            "tensors": safetensors_file(
                {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
            )
        },
        "is not a safetensors file",
    ),
    "a dtype that torch lacks": (
        {"tensors": safetensors_file({"a": ENTRY | {"dtype": "F6_E2M3"}}, b"1234")},
        "is not a safetensors file",
    ),
    "a name for terminals": (
        {"tensors": safetensors_file({"\x1b[31m\n": ENTRY}, b"12345")},
        "is not a safetensors file",
    ),
    "a header nested deeply": (
        {"tensors": safetensors_file(b'{"a":' + b"[" * 500_000)},
        "is nested too deeply",
    ),
    "a state nested deeply": ({"state": b'{"a":' + b"[" * 10**6}, "is nested too deeply"),
    "mappings nested deeply": ({"state": b'{"a":' * 500_000}, "is nested too deeply"),
    "millions of lists": ({"state": b'{"a":[' + b"[]," * (2**22 // 3 - 9)}, NOT_JSON),
    "a key twice": ({"state": b'{"a":1,"a":2}'}, "a key is there twice"),
    "no mapping": ({"state": b"[]"}, "state.json: is not a mapping"),
    "a tag for a mapping": ({"state": b'{"$int":"0x1"}'}, "state.json: is not a mapping"),
    "a bare NaN": ({"state": b'{"a":NaN}'}, "is not a finite number"),
    "an overflow": ({"state": b'{"a":1e999}'}, "is not a finite number"),
    "a long integer": ({"state": b'{"a":' + b"9" * 10**6 + b"}"}, "an integer is too long"),
    "an unknown tag": ({"state": b'{"a":{"$object":"os.system"}}'}, "unknown tag $object"),
    "an unknown tag's look": ({"state": b'{"a":{"$float":"7ff8"}}'}, "unknown tag $float"),
    "no UTF-8": ({"state": b'{"a":"\xff"}'}, NOT_JSON),
    "a byte order mark": ({"state": b"\xef\xbb\xbf{}"}, NOT_JSON),
    "no JSON": ({"state": b"\0"}, NOT_JSON),
    "a path that leads out": ({"manifest": rename_file("../secret")}, NOT_OURS),
    "an absolute path": ({"manifest": rename_file("/etc/passwd")}, NOT_OURS),
    "a file more": ({"manifest": lambda t: t["files"].update(x=t["files"][STATE])}, NOT_OURS),
    "a key more": ({"manifest": change(x=1)}, NOT_OURS),
    "another step": ({"manifest": change(step=6)}, NOT_OURS),
    "another format": ({"manifest": change(format=2)}, "is of format 2; this rnngrad reads 1"),
    "a best that is none": ({"manifest": change(best=1)}, NOT_OURS),
    "no files": ({"manifest": change(files=[])}, NOT_OURS),
    "a size that is none": ({"manifest": claim(STATE, size=2.0)}, NOT_OURS),
    "a negative size": ({"manifest": claim(STATE, size=-1)}, "has 2 bytes in place of -1"),
    "a gigabyte claimed": ({"manifest": claim(TENSORS, size=10**9)}, "in place of 1000000000"),
    "too much state claimed": ({"manifest": claim(STATE, size=2**27)}, "too many"),
    "a hash that is none": ({"manifest": claim(STATE, sha256=[[]])}, "sha256 is not the one"),
    "a manifest nested deeply": ({"manifest": b"[" * 10**6}, "is nested too deeply"),
    "a manifest with a key twice": ({"manifest": b'{"a":1,"a":1}'}, "a key is there twice"),
    "a manifest that is a text": ({"manifest": b'"format"'}, NOT_OURS),
    "a manifest of a megabyte": ({"manifest": b" " * (2**20 + 1)}, "1048576 are allowed"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_is_refused_in_one_line(forgery: str, tmp_path: Path) -> None:
    parts, reason = FORGERIES[forgery]
    forge(tmp_path, 5, **({"tensors": GOOD} | parts))
    assert reason in why(tmp_path)


def test_a_forgery_without_fault_is_read(tmp_path: Path) -> None:
    forge(tmp_path, 5, tensors=GOOD, state=b' {"a" : [1] }')
    loaded = load(tmp_path)
    assert same(loaded.tensors, {"a": torch.tensor([1.0])})
    assert loaded.values == {"a": [1]}


@pytest.mark.parametrize("file", ["tensors", "state", "manifest"])
def test_no_pickle_is_ever_opened(file: str, tmp_path: Path) -> None:
    canary, pickled = tmp_path / "canary", tmp_path / "pickled"
    pickled.write_bytes(canary_pickle(canary))
    forge(tmp_path / "c", 5, **({"tensors": GOOD} | {file: pickled.read_bytes()}))  # type: ignore[arg-type]
    why(tmp_path / "c")
    assert not canary.exists()
    subprocess.run([sys.executable, "-m", "pickle", str(pickled)], check=True, stdout=-3)
    assert canary.exists()  # it would have worked


def test_a_forgery_costs_little_memory(tmp_path: Path) -> None:
    for number, (parts, _) in enumerate(FORGERIES.values()):
        forge(tmp_path / str(number), 5, **({"tensors": GOOD} | parts))
    grown = python(
        "import resource; from pathlib import Path\n"
        "from rnngrad.checkpoint import NothingUsable, load\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before, refused = peak(), 0\n"
        f"for directory in Path({str(tmp_path)!r}).iterdir():\n"
        "    try: load(directory)\n"
        "    except NothingUsable: refused += 1\n"
        "print(refused, peak() - before)"
    )
    refused, megabytes = map(int, grown.split())
    assert refused == len(FORGERIES)
    assert megabytes < 200
