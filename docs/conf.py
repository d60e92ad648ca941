"""Sphinx: `make docs`. The generated parts of the pages are written first (generate.py)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from generate import write_pages  # noqa: E402

write_pages()

project = "Partial Model Collapse"
copyright = "the authors of this repository, MIT license"
extensions = ["myst_nb", "sphinx_copybutton"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
nb_execution_mode = "off"  # the notebook has its outputs
exclude_patterns = ["_build"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "Partial Model Collapse"
html_show_sphinx = False
copybutton_prompt_text = "$ "
