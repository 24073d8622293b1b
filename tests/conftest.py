"""Small sizes everywhere: one thread is faster than two."""

import signal
from collections.abc import Iterator

import pytest
import torch

from rnngrad.config import REGISTRIES
from rnngrad.kernels import fused, reference_only

torch.set_num_threads(1)

# what starts the tests may ignore these, as nohup and a shell's & do, and so would the runs
for _number, _usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)


@pytest.fixture(scope="module", params=["compiled", "compiled_3_threads", "reference"])
def every_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests once with each way of computing the recurrence."""
    if request.param == "reference":
        with reference_only():
            yield request.param
    elif request.param == "compiled":
        yield request.param
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "SERIAL_WORK", 0)
            torch.set_num_threads(3)
            yield request.param
            torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leave_the_menu_as_it_was() -> Iterator[None]:
    """A part that a test adds, as a user's plugin would, goes with the test."""
    before = {group: dict(registry.load()) for group, registry in REGISTRIES.items()}
    yield
    for group, parts in before.items():
        for name in REGISTRIES[group].keys() - parts.keys():
            del REGISTRIES[group][name]
