"""What `import lsoftmax` brings along, in a fresh interpreter that has torch and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lsoftmax

# Every optional dependency of pyproject.toml, by the name it is imported by.
OPTIONAL = (
    "matplotlib", "tqdm", "pytorch_metric_learning", "liger_kernel", "cut_cross_entropy", "quack",
    "sklearn", "PIL", "pytest", "jsonschema", "setuptools", "ninja", "scipy", "hypothesis",
    "onnx", "onnxruntime", "onnxscript", "lightning", "timm", "torchvision", "sphinx", "docutils",
    "myst_parser", "furo",
)  # fmt: skip

PROGRAM = """
import sys, json, torch, numpy
for name in sys.argv[1:]:
    sys.modules[name] = None  # importing it fails, as where it is not installed
before = set(sys.modules)
import lsoftmax
x = torch.randn(4, 3, requires_grad=True)
lsoftmax.LSoftmaxLoss(3, 5)(x, torch.arange(4)).backward()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_nothing_but_torch_and_numpy() -> None:
    """Neither other packages nor torch's compiler, which takes longer to import than torch itself.

    Red for `@torch.compiler.disable` in a module that is always imported, say.
    """
    command = [sys.executable, "-c", PROGRAM, *OPTIONAL]
    environment = {**os.environ, "PYTHONPATH": str(Path(lsoftmax.__file__).parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    imported = json.loads(run.stdout)
    roots = {name.partition(".")[0] for name in imported}
    assert roots <= {"lsoftmax", "torch", "numpy", *sys.stdlib_module_names}
    slow = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx"}
    assert not slow & set(imported)
    assert "lsoftmax.distributed" not in imported
