"""The site: `sphinx-build -W -b html -c docs . _site`, from the root, whose links are its own."""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

import lightning_genseg

project = "lightning_genseg"
author = copyright = "The lightning-genseg developers"
version = release = lightning_genseg.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "notebooks/*.ipynb",
    "experiments/*.md",
    "experiments/*/README.md",
    "C*.md",
]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

html_theme = "pydata_sphinx_theme"
html_title = "lightning_genseg"
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": False,
    "header_links_before_dropdown": 7,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]  # the root leads to docs/index.html
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("docs/index", "docs/start", "docs/data")}  # nothing below

nb_execution_mode = "off"  # notebooks/refresh.py has run them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

default_role = "py:obj"  # `GMMSeg` in a docstring is a link where it names something of ours
add_module_names = False
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # Lightning's are written for its own site
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 80

# Every public name of these must have an entry.
PUBLIC = ["", ".data", ".methods", ".mixtures", ".uncertainty", ".metrics", ".callbacks"]
HOOKS = {*dir(Callback), *dir(LightningDataModule), *dir(LightningModule)} - {"forward"}


def math(block: bool) -> Callable[[Any, nodes.Element], None]:
    """Write formulas as MathML, which browsers draw without a script from elsewhere."""

    def visit(writer: Any, node: nodes.Element) -> None:
        writer.body.append(tex2mathml(node.astext(), as_block=block))
        raise nodes.SkipNode

    return visit


def check_public_names(app: Sphinx, env: Any) -> None:
    """Warn of public names that no page describes."""
    described = {entry.split(".")[-1] for entry in env.get_domain("py").objects}
    for room in PUBLIC:
        module = importlib.import_module(f"lightning_genseg{room}")
        for name in sorted(set(module.__all__) - described):
            logging.getLogger(__name__).warning("%s.%s is on no page", module.__name__, name)


def show_arguments(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """Give the arguments of `__init__` where the hub's mixin hides them behind its `__new__`."""
    if what == "class" and signature == "(*args, **kwargs)":
        signature = stringify_signature(inspect.signature(obj), show_annotation=False)
        signature = re.sub(r"(\w+)\(\w+=[^()]*\)", r"\1()", signature)  # groups of options
    return signature, returns


def keep_letters(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """`num_classes: C.` is no list that starts at C."""
    lines[:] = [re.sub(r"^( +)([A-Z]\.)$", r"\1\\\2", line) for line in lines]


def skip_known(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Leave out fields of a named tuple, which its docstring explains, and Lightning's hooks."""
    return skip or type(obj).__name__ == "_tuplegetter" or (what == "class" and name in HOOKS)


def setup(app: Sphinx) -> None:
    """Register what is ours."""
    app.add_html_math_renderer("mathml", (math(False), None), (math(True), None))
    app.connect("autodoc-process-signature", show_arguments)
    app.connect("autodoc-process-docstring", keep_letters, priority=600)  # after napoleon
    app.connect("autodoc-skip-member", skip_known)
    app.connect("env-check-consistency", check_public_names)


html_math_renderer = "mathml"
