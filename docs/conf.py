"""Settings of the built documentation: `make docs`. Builds without a network."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import lsoftmax

project = "lsoftmax"
author = "the lsoftmax authors"
version = release = lsoftmax.__version__
root_doc = "index"
# README.md is what a reader of the source tree sees; index.rst includes it.
exclude_patterns = ["_build", "README.md"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]

# ---- text ---------------------------------------------------------------------------------------

# What GitHub renders too: $inline$ and ```math blocks.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
highlight_language = "none"  # indented blocks are commands, tables and formulas

# ---- the API from its docstrings ----------------------------------------------------------------

autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

nitpick_ignore = [("py:class", "lsoftmax.published.Layer")]  # a type variable

# ---- pages --------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"lsoftmax {version}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

TORCH = "https://docs.pytorch.org/docs/stable/"
PYTHON = "https://docs.python.org/3/library/"
# Where other projects document what docstrings name: so few that no inventory need be fetched.
ELSEWHERE = {
    r"(torch\.)?Tensor": f"{TORCH}tensors.html",
    r"torch\.(device|dtype)": f"{TORCH}tensor_attributes.html",
    r"torch\.distributed\..*": f"{TORCH}distributed.html",
    r"torch\.nn\.[\w.]+": f"{TORCH}generated/{{}}.html",
    r"(\w+Error(, )?)+": f"{PYTHON}exceptions.html",
    r"int|float|bool|str|tuple|dict|list": f"{PYTHON}stdtypes.html",
    r"collections\.abc\.\w+": f"{PYTHON}collections.abc.html",
    r"pathlib\.Path": f"{PYTHON}pathlib.html",
    r"matplotlib\.figure\.Figure": "https://matplotlib.org/stable/api/figure_api.html",
}


def link_elsewhere(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Resolves names that are not documented here."""
    for pattern, page in ELSEWHERE.items():
        if re.fullmatch(pattern, node["reftarget"]):
            uri = page.format(node["reftarget"])
            return nodes.reference("", "", content, internal=False, refuri=uri)
    return None


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """The benchmarks' results, a file beside docs/ in the source tree, are a page here."""
    results = "../benchmarks/results/"
    if name == "benchmarks":
        source[0] = Path(__file__).parent.joinpath(results, "README.md").read_text()
        source[0] = source[0].replace("](", f"]({results}")
    source[0] = source[0].replace(f"{results}README.md", "benchmarks.md")


def mathml(node: nodes.Element, as_block: bool) -> str:
    """A formula as MathML, which browsers draw themselves: no scripts, no network."""
    try:
        drawn: str = tex2mathml(node.astext(), as_block=as_block)
        return drawn.replace("<mo>|</mo>", '<mo lspace="0" rspace="0" stretchy="false">|</mo>')
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", node.astext(), error, location=node)
        return f"<code>{html.escape(node.astext())}</code>"


def visit_math(translator: Any, node: nodes.Element) -> None:
    translator.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.Element) -> None:
    translator.body.append(f'<div class="math">{mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", link_elsewhere)
    app.connect("source-read", read_page)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None)
    )
