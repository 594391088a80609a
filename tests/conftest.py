"""What all tests share: one thread, no network, no display, nothing sent anywhere.

No fixtures here: a test gets what it needs from its own folder.
"""

import ipaddress
import os
import sys
from typing import Any

import hypothesis
import pytest

# A test says what is right, not how fast: other work on the machine must not fail it.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
NO_DISPLAY = {"MPLBACKEND": "Agg"}
NOTHING_SENT = {
    "WANDB_MODE": "disabled",  # a test of the logger itself sets "offline"
    "WANDB_SILENT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="run the tests marked thorough too (make test-thorough)",
    )
    parser.addoption(
        "--network", action="store_true", help="run the tests marked network, and allow it to all"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n auto``: one a core that we may use, up to eight; 0, this process, for one.

    A test keeps one core busy, and a worker takes a gigabyte or two.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, 8) if cores > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module is imported: torch reads its threads and matplotlib its backend at
    # import, and the workers and the processes that tests start inherit them.
    os.environ.update(ONE_THREAD | NO_DISPLAY | NOTHING_SENT)
    if not config.getoption("--network"):
        os.environ.update(OFFLINE)
        sys.addaudithook(refuse_network)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--network"):
        skip = pytest.mark.skip(reason="needs the internet; run with --network")
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(skip)
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: let no connection leave this machine, whichever library opens it."""
    if event != "socket.connect":
        return
    address = arguments[1]
    if isinstance(address, tuple) and not is_this_machine(str(address[0])):
        raise RuntimeError(
            f"a test connects to {address[0]}; mark it network and run with --network, "
            "or give it data of its own"
        )


def is_this_machine(host: str) -> bool:
    """Whether a host is a loopback or unspecified address, or ``localhost``."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host in {"", "localhost"}
    return address.is_loopback or address.is_unspecified
