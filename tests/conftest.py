"""Where the tests run, and what their inputs are drawn from.

    pytest                       the portable implementation, and all that has no device
    pytest --backend emulation   the CUDA kernels and their host code, emulated on the CPU
    pytest --backend sanitized   the same under AddressSanitizer and UBSan; see test_sanitized.py
    pytest --backend cuda        the CUDA kernels on a GPU

The last three run every test that takes the ``device`` fixture, and only those; the emulated ones
leave out the experiments.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Generator, Iterator

import pytest
import torch

BACKENDS = ("portable", "emulation", "sanitized", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, default="portable", help="what runs the ops")
    parser.addoption("--seed", type=int, default=None, help="repeat a run's random inputs")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is None:
        config.option.seed = random.SystemRandom().randrange(10**6)
    torch.set_num_threads(2)
    backend = config.getoption("--backend")
    if backend in ("emulation", "sanitized"):
        import lsoftmax
        from emulation import build

        build.load(sanitize=backend == "sanitized")
    if backend == "cuda":
        import lsoftmax

        # Trainings are compared to the bit, convolutions and products with those of float32.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        if not torch.cuda.is_available():
            raise pytest.UsageError("--backend cuda: torch sees no GPU")
        if not lsoftmax.cuda_available():
            raise pytest.UsageError("--backend cuda: no kernels; python -m lsoftmax says why")


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("--seed")
    return f"backend: {config.getoption('--backend')}, torch {torch.__version__}, --seed {seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = config.getoption("--backend")
    if backend == "portable":
        return
    # Experiments are for the device: an emulated one takes minutes for what other tests show.
    emulated = backend != "cuda"

    def runs(item: pytest.Item) -> bool:
        return "device" in item.fixturenames and not (
            emulated and item.path.name == "test_experiments.py"
        )

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """After a fault of the GPU nothing in this process can be told right from wrong."""
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(torch.AcceleratorError):
        item.session.shouldstop = f"the GPU has failed in {item.nodeid}"
    return report


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh inputs in every run; the header's seed and the test's name give them again."""
    torch.manual_seed(hash_of(f"{request.config.getoption('--seed')} {request.node.name}"))


def hash_of(text: str) -> int:
    """The same in every process, unlike hash(), and in the 32 bits that torch seeds a CPU with."""
    return zlib.crc32(text.encode())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--backend")


@pytest.fixture
def device(backend: str) -> str:
    """Where a test's tensors live: on the CPU the emulation serves the ops in place of torch."""
    return "cuda" if backend == "cuda" else "cpu"
