"""Pages with parts made from results: what lies between ``<!-- NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re

_BLOCK = r"(<!-- {} -->\n).*?(<!-- end -->)"


def blocks(page: str) -> list[str]:
    """Their names, in order."""
    return re.findall(r"<!-- (?!end -->)(.*?) -->\n", page)


def fill(page: str, name: str, text: str) -> str:
    """The page with this text, which ends a line, in that block.

    Raises:
        SystemExit: the page has not exactly one such block.
    """
    pattern = re.compile(_BLOCK.format(re.escape(name)), re.DOTALL)
    page, found = pattern.subn(lambda match: match[1] + text + match[2], page)
    if found != 1:
        raise SystemExit(f"expected one block <!-- {name} --> ... <!-- end -->, found {found}")
    return page
