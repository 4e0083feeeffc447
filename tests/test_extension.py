"""setup.py's choices, the loader's sentences and `python -m lsoftmax`: no build, no network."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

import lsoftmax
from lsoftmax import __main__ as report
from lsoftmax import _extension

ROOT = Path(__file__).resolve().parents[1]


def load_setup():
    spec = importlib.util.spec_from_file_location("lsoftmax_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def test_the_package_under_test_is_the_one_installed_from_here():
    try:
        installed = distribution("lsoftmax")
    except PackageNotFoundError:
        pytest.skip("lsoftmax is not installed: ./lsoftmax is under test, on purpose")
    assert installed.version == lsoftmax.__version__
    source = json.loads(installed.read_text("direct_url.json") or "{}")
    if "dir_info" in source:
        assert source["url"] == ROOT.as_uri(), "installed from another source tree"
        if not source["dir_info"].get("editable"):
            assert not Path(lsoftmax.__file__).is_relative_to(ROOT / "lsoftmax"), "hidden by it"


# ---- setup.py -----------------------------------------------------------------------------------

NVCC_12 = "compute_50 compute_75 compute_80 compute_86 compute_89 compute_90".replace(" ", "\n")
NVCC_13 = "\n".join(f"compute_{a}" for a in (75, 80, 86, 89, 90, 100, 103, 120, 121))


@pytest.mark.parametrize(
    ("nvcc", "gpus", "archs"),
    [
        (NVCC_13, set(), "8.0;9.0a;10.0+PTX;12.0+PTX"),  # 11.0 runs the PTX of 10.0
        (NVCC_12, set(), "8.0+PTX;9.0a"),  # the PTX of 9.0a runs nowhere else
        (NVCC_13, {(9, 0)}, "9.0a"),
        (NVCC_13, {(9, 0), (8, 0)}, "8.0+PTX;9.0a"),
        (NVCC_13, {(12, 0), (8, 6)}, "8.6;12.0+PTX"),
        (NVCC_12, {(12, 0)}, "9.0+PTX"),  # newer than this nvcc: by PTX
        (NVCC_13, {(7, 5), (8, 0)}, "8.0+PTX"),  # too old for the kernels: left out
    ],
)
def test_archs(nvcc, gpus, archs):
    assert setup.choose_archs(nvcc, gpus) == archs


@pytest.mark.parametrize(
    ("archs", "told"),
    [
        ("9.0", "9.0a"),
        ("8.0;9.0 10.0", "8.0;9.0a 10.0"),
        ("9.0a;9.0+PTX;19.0", "9.0a;9.0+PTX;19.0"),
        ("Ampere;Hopper", "Ampere;9.0a"),
    ],
)
def test_hopper_is_given_its_instructions(archs, told):
    assert setup.with_hopper(archs) == told


@pytest.mark.parametrize(
    ("archs", "numbers"),
    [
        ("8.0;9.0a", "8.0;9.0a"),
        ("Hopper", "9.0+PTX"),
        ("Ampere 12.0+PTX", "8.0;8.6+PTX;12.0+PTX"),
        ("12.0+PTX;8.0;10.0+PTX;9.0a", "8.0;9.0a;10.0+PTX;12.0+PTX"),
    ],
)
def test_archs_are_recorded_as_numbers(archs, numbers, monkeypatch):
    """Red if the report is told a name, which it takes for no GPU at all, or torch's order."""
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    assert setup.as_built(cpp_extension) == numbers


@pytest.mark.parametrize("archs", ["all", "foo", "8.0, 9.0", "5.05"])
def test_archs_that_torch_does_not_know(archs, monkeypatch):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: expected.*got '{archs}'"):
        setup.as_built(cpp_extension)


@pytest.mark.parametrize(("nvcc", "gpus"), [(NVCC_13, {(7, 0)}), ("compute_75", set())])
def test_archs_that_are_too_old(nvcc, gpus):
    with pytest.raises(setup.NoKernelsError, match=r"compute capability 8\.0"):
        setup.choose_archs(nvcc, gpus)


def test_what_a_toolkit_of_wheels_is_linked_with(tmp_path):
    names = ["c10", "cudart", "c10_cuda"]
    assert setup.libraries(tmp_path, names) == names
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart.so.13").touch()
    assert setup.libraries(tmp_path, names) == ["c10", ":libcudart.so.13", "c10_cuda"]
    (tmp_path / "lib" / "libcudart.so").touch()
    assert setup.libraries(tmp_path, names) == names


@pytest.mark.parametrize("werror", ["0", "1"])
def test_flags_leave_to_torch_what_is_torchs(monkeypatch, werror):
    monkeypatch.setenv("LSOFTMAX_WERROR", werror)
    flags = setup.compile_flags(["/home/archie/torch/include"])
    words = flags["cxx"] + flags["nvcc"]
    assert not [word for word in words if word.startswith("-std") or "fast" in word]
    # For torch an nvcc flag with "arch" in it, a path too, means: add no architectures.
    assert not [word for word in flags["nvcc"] if "arch" in word]
    assert ("-Werror" in words) == (werror == "1")


# ---- the loader ---------------------------------------------------------------------------------

FACTS = {"torch": "2.13.0+cu130", "cuda": "13.0"}


@pytest.mark.parametrize(
    ("info", "version", "cuda", "sentence"),
    [
        (FACTS, "2.13.0+cu130", "13.0", ""),
        (FACTS, "2.13.1", "13.0", ""),  # patch releases keep the ABI
        ({}, "2.13.0", "13.0", ""),
        (FACTS, "2.15.0", "13.2", "torch 2.13.0 (CUDA 13.0), this is torch 2.15.0 (CUDA 13.2)"),
        (FACTS, "2.13.0+cu126", "12.6", "this is torch 2.13.0 (CUDA 12.6)"),
        (FACTS, "2.13.0+cpu", None, "this is torch 2.13.0 (no CUDA)"),
        (FACTS, "2.13.0a0+git12", "13.0", "this is torch 2.13.0a0"),
        (FACTS | {"torch": "2.13.0a0+git12"}, "2.13.0a0+git12", "13.0", ""),
        (FACTS | {"torch": "2.13.0a0+git12"}, "2.13.0a0+git13", "13.0", "torch 2.13.0a0+git13"),
        ({**FACTS, "python": "3.1"}, "2.13.0", "13.0", "for Python 3.1, this is 3."),
    ],
)
def test_why_unfit(info, version, cuda, sentence):
    why = _extension.why_unfit(info, version, cuda)
    assert sentence in why
    assert bool(sentence) == bool(why)
    assert why.endswith(_extension.install_command()) == bool(sentence)


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """A copy of the loader in a package of its own, which has `extension` for compiled kernels."""

    def make(info: dict | None, extension: str | None):
        package = tmp_path / f"loader_{tmp_path.name}"  # a new name: imports are remembered
        package.mkdir()
        (package / "__init__.py").touch()
        shutil.copy(_extension.__file__, package / "_extension.py")
        if info is not None:
            (package / "_build_info.json").write_text(json.dumps(info))
        if extension is not None:
            (package / "_C.py").write_text(extension)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(f"{package.name}._extension")

    return make


HERE = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "archs": "9.0"}


def test_kernels_that_fit(loader):
    module = loader(HERE, "x = 1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load()
        module.warn_once_no_kernels()
    assert module.cuda_available()
    assert module.status() == module.Status(
        built=True, loaded=True, reason="", torch_built=HERE["torch"],
        archs="9.0",
    )  # fmt: skip


@pytest.mark.parametrize("info", [None, {"missing": "there is no nvcc"}])
def test_kernels_that_were_not_built(loader, info):
    module = loader(info, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a machine without kernels is nothing to warn about...
        module.load()
    assert not module.status().built
    assert not module.cuda_available()
    if info:
        assert "there is no nvcc." in module.status().reason
    with pytest.warns(RuntimeWarning, match="runs CUDA tensors in plain PyTorch") as seen:
        module.warn_once_no_kernels()  # ...until a CUDA tensor has to do without
        module.warn_once_no_kernels()
    assert len(seen) == 1
    assert "python -m lsoftmax" in str(seen[0].message)


@pytest.mark.parametrize(
    ("info", "extension", "sentence"),
    [
        ({**HERE, "torch": "1.2.3"}, "raise SystemExit('imported')", "built for torch 1.2.3"),
        (HERE, "raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ({**HERE, "python": "3.1"}, None, "built for Python 3.1"),
        (HERE, None, "do not load (No module named"),  # deleted, or of another platform
    ],
)
def test_kernels_that_cannot_be_used(loader, info, extension, sentence):
    module = loader(info, extension)
    with pytest.warns(RuntimeWarning) as seen:
        module.load()
    assert len(seen) == 1
    assert sentence in str(seen[0].message)
    assert sentence in module.status().reason
    assert module.status().built
    assert not module.cuda_available()


def test_a_broken_record_is_no_record(tmp_path):
    assert _extension.read_build_info(tmp_path) == {}
    for text in ("", "{", "[]", "null"):
        (tmp_path / "_build_info.json").write_text(text)
        assert _extension.read_build_info(tmp_path) == {}


# ---- python -m lsoftmax -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # a later minor of the same major
        ("8.6", (8, 0), False),
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (10, 0), True),
        ("8.0 9.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (12, 0), False),
    ],
)
def test_covers(archs, capability, runs):
    assert report.covers(archs, capability) == runs


def test_report():
    command = [sys.executable, "-m", "lsoftmax"]
    env = {**os.environ, "PYTHONPATH": str(Path(lsoftmax.__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=True)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line)
    assert lines["lsoftmax"].startswith(f"{lsoftmax.__version__} in ")
    assert lines["torch"].startswith(str(torch.__version__))
    assert lines["kernels"] in ("loaded", "not built")
    assert "op         lsoftmax::" in result.stdout


@pytest.mark.parametrize(
    ("state", "cuda", "driver", "no_toolkit", "sentences"),
    [
        ("none", None, "", "", []),
        ("none", None, "580.1", "", ["install a CUDA build of torch"]),
        (
            "none",
            "13.2",
            "",
            "no nvcc: do this",
            ["No nvcc: do this.", "LSOFTMAX_CUDA=1 pip install"],
        ),
        ("none", "13.2", "580.1", "", ["LSOFTMAX_CUDA=1 pip install", "nvidia-smi"]),
        ("unfit", "13.2", "580.1", "", ["why unfit"]),
        ("loaded", "13.2", "", "", ["torch sees no GPU (there is no NVIDIA driver)"]),
    ],
)
def test_advice(monkeypatch, state, cuda, driver, no_toolkit, sentences):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status = _extension.Status(
        built=state != "none",
        loaded=state == "loaded",
        reason="" if state == "loaded" else "why unfit",
    )
    todo = report.advice(status, driver, no_toolkit)
    assert bool(todo) == bool(sentences)
    for sentence in sentences:
        assert sentence in "\n".join(todo)


def test_advice_for_a_gpu_without_kernel_image(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (12, 0)][i])
    status = _extension.Status(built=True, loaded=True, reason="", archs="9.0a")
    (todo,) = report.advice(status, "580.1", "13.0")
    assert "GPU 1 is of compute capability 12.0, the kernels are for 9.0a" in todo
    assert "TORCH_CUDA_ARCH_LIST=12.0" in todo
