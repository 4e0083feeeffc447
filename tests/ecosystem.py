"""Other libraries, which a test or a page's Python needs and an environment need not have."""

from __future__ import annotations

import pkgutil
from typing import Any

import pytest


def needed(name: str) -> Any:
    """A module, or an attribute of one; skips the test where it is not there.

    A torchvision built for another torch ends its import, and that of what imports it, in a
    RuntimeError.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, RuntimeError) as error:
        pytest.skip(f"needs {name}, which is not here: {error}")
