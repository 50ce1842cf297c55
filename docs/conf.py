"Sphinx's configuration; `build.py` writes the sources it reads"
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from latex2mathml.converter import convert

here = Path(__file__).parent
sys.path.insert(0, str(here.parent)) # the package of this checkout is the one described
parser = ConfigParser(delimiters=["="])
parser.read(here.parent/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

project, author, release, copyright = cfg["title"], cfg["author"], cfg["version"], cfg["copyright"]
language = "en"
extensions = ["myst_nb", "sphinx.ext.viewcode", "sphinx_copybutton"]
nitpicky = True # a reference to something that is not there is a warning, and the build takes none
viewcode_follow_imported_members = False # the module of a constant is where it stands, not where its class is defined
smartquotes = False
suppress_warnings = ["misc.highlighting_failure"] # cells of shell commands are no Python

nb_execution_mode = "off" # outputs are stored in the notebooks
nb_merge_streams = True
nb_ipywidgets_js = {} # nothing is fetched when a page is read; widgets are shown by the HTML or picture they store
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3

add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_prompt_text = "$ "
html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_search_scorer = str(here/"scorer.js")
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_theme_options = dict(github_url=cfg["git_url"], logo=dict(text=project), show_toc_level=2, navigation_depth=2, navigation_with_keys=False, show_nav_level=1,
                          search_bar_text="Search", footer_start=["copyright"], footer_end=[], back_to_top_button=False)
html_sidebars = {name: [] for name in ("index", "commands", "changelog")} # they have no pages below them
html_context = dict(default_mode="auto")


def mathml(display):
    "Writes a formula as MathML, which browsers draw without a script"
    def visit(self, node):
        text = re.sub(r"\\begin\{(aligned|split)\}", r"\\begin{align*}", re.sub(r"\\end\{(aligned|split)\}", r"\\end{align*}", node.astext()))
        self.body.append(convert(text, display=display))
        from docutils.nodes import SkipNode
        raise SkipNode
    return visit


def setup(app): app.add_html_math_renderer("mathml", (mathml("inline"), None), (mathml("block"), None))
