"""Environments to install in, and kernels built in one.

Each test gets an empty environment on top of a shared one that holds torch. The shared ones are
made here (a CPU build of torch; the newest torch with CUDA, and pip's nvcc), unless
LSOFTMAX_TEST_CPU_PYTHON and LSOFTMAX_TEST_CUDA_PYTHON name Pythons that have them, with setuptools
and ninja.
"""

from __future__ import annotations

import os

import pytest

from install.environments import Environment, copy_source, make_base, run
from lsoftmax._toolkit import requirements

CPU_TORCH, CUDA_TORCH = "torch==2.13.0", "torch"


@pytest.fixture(scope="session")
def cpu_base(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("cpu"), CPU_TORCH, "LSOFTMAX_TEST_CPU_PYTHON")
    if "None" not in run(base, "-c", "import torch; print(torch.version.cuda)"):
        pytest.skip(f"{CPU_TORCH} is not a CPU build here: name one by LSOFTMAX_TEST_CPU_PYTHON")
    return base


@pytest.fixture(scope="session")
def cuda_base(tmp_path_factory):
    variable = "LSOFTMAX_TEST_CUDA_PYTHON"
    base = make_base(tmp_path_factory.mktemp("cuda"), CUDA_TORCH, variable)
    cuda = run(base, "-c", "import torch; print(torch.version.cuda)").strip()
    if cuda == "None":
        pytest.skip(f"{CUDA_TORCH} is a CPU build here: name one by {variable}")
    if variable not in os.environ:
        run(base, "-m", "pip", "install", *requirements(cuda))
    return base


@pytest.fixture
def cpu(tmp_path, cpu_base):
    return Environment(tmp_path / "cpu", cpu_base)


@pytest.fixture
def cuda(tmp_path, cuda_base):
    return Environment(tmp_path / "cuda", cuda_base)


@pytest.fixture
def source(tmp_path):
    return copy_source(tmp_path)


@pytest.fixture(scope="session")
def built(tmp_path_factory, cuda_base):
    """The kernels built by a plain `pip install`, without a GPU: every architecture we support."""
    directory = tmp_path_factory.mktemp("built")
    environment = Environment(directory / "venv", cuda_base)
    environment.source = copy_source(directory)
    environment.output = environment.install(environment.source)
    return environment
