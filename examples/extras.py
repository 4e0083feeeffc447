"""What the examples need beyond the package itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(extra: str = "examples") -> Iterator[None]:
    """Around imports: a package that is not installed ends the program with what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise SystemExit(
            f'This example needs {package}, which is not installed: pip install "lsoftmax[{extra}]"'
        ) from None
