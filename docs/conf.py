"""Sphinx: Markdown pages through MyST, the reference from docstrings. The build needs no network."""

import effref

project = "effref"
author = "the effref developers"
copyright = f"2026, {author}"
version = release = effref.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say it, with shapes
napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes as a list, not as objects of their own

html_theme = "furo"
html_title = "effref"

# Equations are drawn in the reader's browser by MathJax, which it loads when a page is opened. For readers without a
# network, put MathJax into _static and set mathjax_path to it; every equation is also there as text.
