"""The site, which `./build_docs.sh` makes: pages are the Markdown files of the repository where they lie.

Flags come from the commands, the API from docstrings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

project, author, html_title = "SegMAE", "the SegMAE team", "SegMAE"
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "sphinx_copybutton", "sphinx_design"]
include_patterns = ["*.md", "mae/*.md", "segments/*.md", "segmenter/*.md", "docs/*.md", "perf/*.md"]
root_doc = "docs/index"
html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "navigation_with_keys": False, "show_toc_level": 2, "footer_start": ["copyright"], "footer_end": [],
}  # fmt: skip
html_extra_path = ["extra"]  # the front page by the name that servers look for
html_copy_source = html_show_sourcelink = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # docstrings give shapes and units
autodoc_member_order = "bysource"
# Types of other libraries: their inventories would have to be downloaded.
nitpick_ignore_regex = [("py:.*", r"(?!(common|engine|mae|segmenter|segments|pipeline)\.).*")]
