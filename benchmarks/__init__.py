"""Speed, memory and exactness of the layer beside everything a user could pick in its place.

python -m benchmarks --help
python -m benchmarks report
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# `python -m` puts the working directory first on sys.path, and the ./lsoftmax there holds no
# kernels. With the root last, the installed package is measured where there is one.
sys.path.sort(key=lambda path: Path(path or ".").resolve() == ROOT)
