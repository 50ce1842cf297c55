"The site and the README: complete, built without a warning, no link that leads nowhere"
import inspect
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/"docs"))
import readme  # noqa: E402
import reference  # noqa: E402

from mdl_nbdev.base import settings  # noqa: E402


@pytest.fixture(scope="module")
def package(): return reference.load()


@pytest.mark.parametrize("module", reference.modules)
def test_every_public_name_has_its_entry(package, module):
    page = reference.module_page(module)
    for name in package[module].__all__:
        o = getattr(package[module], name)
        kind = "class" if inspect.isclass(o) else "function" if inspect.isfunction(o) else "data"
        assert re.search(rf"^`+{{py:{kind}}} {name}\b", page, re.M), name
        for method in [k for k, v in vars(o).items() if inspect.isfunction(v) and not k.startswith("_")] if kind == "class" else []:
            assert re.search(rf"^`+{{py:\w+}} {name}\.{method}\(", page, re.M), f"{name}.{method}"


def test_parameters_are_in_the_tables():
    page = reference.module_page("data.audio")
    entry = page[page.index("{py:function} load_audio("):].split("\n````\n")[0]
    names = [k for k in inspect.signature(reference.load()["data.audio"].load_audio).parameters]
    assert names and all(re.search(rf"^\| `{name}` \| `[^`]+` \| .+ \| \S.* \|$", entry, re.M) for name in names)
    assert re.search(r"^\| \*returns\* \| `ndarray`", entry, re.M)
    settings = reference.module_page("base.settings")
    settings = settings[settings.index("{py:class} TrainSettings"):].split("\n`````\n")[0]
    assert "| `lr` | `float` | `0.0001` | Peak learning rate |" in settings
    assert "| `base_dir` |" in settings, "what a settings class inherits is in its table"


def test_methods_added_by_patch_have_their_entry():
    assert "{py:method} CsvFile.rows(on_bad=None, block=None)" in reference.module_page("data.tables")


def test_a_class_is_left_out_where_it_is_the_methods_own():
    assert "{py:function} from_args(cls, argv=None, prog='mdl')" in reference.module_page("base.command_line")
    assert "{py:method} Conversation.from_json(text)" in reference.module_page("data.conversations")


@pytest.mark.parametrize("value, shown", [("a|b", r"a\|b"), ("`a|b` c_d", r"`a\|b` c\_d"), ("<out>.csv", r"\<out\>.csv"), ("$x$ *", r"\$x\$ \*")])
def test_text_means_what_it_says(value, shown): assert reference.escape(value) == shown


def test_every_option_of_every_command_is_on_the_page(package):
    settings, page = package["base.settings"], reference.commands_page()
    assert len(reference.commands) == 10
    for command in reference.commands:
        section = page[page.index(f"\n## {command}\n"):].split("\n## ")[1]
        actions = reference.command_parser(command)._actions
        assert len(actions) > 3
        for a in actions:
            row = re.search(rf"^\| `{re.escape(a.option_strings[-1] if a.option_strings else a.metavar)}`{{#\S+}} \|.*$", section, re.M)
            text, default = row[0].split(" | ")[3].removesuffix(" |"), row[0].split(" | ")[2]
            assert text and text == reference.escape(re.sub(r" (\[[^\[]*\]|\(required\))$", "", a.help.replace("%%", "%"))), a.option_strings
            if a.dest not in ("help", "config"): assert default.strip(), a.option_strings
    assert settings.TrainSettings.__doc__ in page


def test_a_new_option_is_seen(package, monkeypatch):
    "The page comes from the parser that the script itself uses"
    parser = package["base.command_line"].parser
    def more(cls, prog):
        p = parser(cls, prog)
        p.add_argument("--one-more", metavar="N", help="Something new [7]")
        return p
    monkeypatch.setattr(package["base.command_line"], "parser", more)
    assert "| `--one-more`{#mdl-check-one-more} | `N` | `7` | Something new |" in reference.commands_page()


@pytest.mark.parametrize("path", sorted((root/"nbs").rglob("[0-9i]*.ipynb")), ids=lambda p: p.stem)
def test_links_between_chapters(path):
    "Without building the site, which finds broken links too"
    text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    assert not [link for link in re.findall(r"\]\((?!https?:)([^)#\s]+\.ipynb)", text) if not (path.parent/link).exists()]


@pytest.mark.parametrize("path", sorted((root/"nbs").rglob("[0-9i]*.ipynb")), ids=lambda p: p.stem)
def test_commands_in_texts_have_their_options(path):
    "Lines to copy that the automatic tests do not run"
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]
    text, found = "\n".join(cells).replace("\\\n", " "), []
    for name, rest in re.findall(r"\bmdl_(check|convert|train|infer|merge|eval|review|compare|serve|demo)\b((?:(?!\bmdl_)[^\n`|;#&])*)", text):
        known = {*vars(getattr(settings, f"{name.title()}Settings"))["__dataclass_fields__"], "config", "help"}
        found += [f"mdl_{name} --{o}" for o in re.findall(r"(?<![\w-])--([a-z][\w-]*)", rest) if o.replace("-", "_") not in known]
    assert not found


def test_readme_links():
    text = (root/"README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=[\"']([^\"']+)", text)
    local = [a or b for a, b in links if not re.match(r"https?:|#|data:", a or b)]
    assert local, "the README has a picture"
    missing = [link for link in local if not (root/link.split("#")[0]).exists()]
    assert not missing
    here = re.findall(r"\]\(https://github\.com/mdl-nbdev/mdl_nbdev/blob/main/([^)#]+)", text)
    assert not [link for link in here if not (root/link).exists()], "a link to a file of this repository that is not there"
    assert text == readme.readme(root/"nbs"/"index.ipynb")


class Page(HTMLParser):
    "The ids of a page, and what it refers to"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("name"): self.ids.add(attrs["name"])
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag in ("img", "script", "audio", "source", "iframe") and attrs.get("src"): self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload"): self.loaded.append(attrs["href"])


def broken(site): # Folder of a built site
    "What the pages of `site` refer to and nobody finds: (page, reference)"
    pages = {p: Page(p) for p in site.rglob("*.html") if "_static" not in p.relative_to(site).parts} # the theme keeps templates there
    for path, page in pages.items():
        for ref in page.links + page.loaded:
            url = urlsplit(ref)
            if url.scheme or url.netloc:
                if ref in page.loaded and url.scheme != "data": yield path.name, ref # a page that needs the network
                continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path
            if not target.is_file(): yield path.name, ref
            elif url.fragment and target in pages and path.name != "search.html" and unquote(url.fragment) not in pages[target].ids: yield path.name, ref


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")/"site"
    r = subprocess.run([sys.executable, root/"docs"/"build.py", out], capture_output=True, text=True, cwd=out.parent)
    assert r.returncode == 0, r.stdout + r.stderr # a warning is an error
    return out


@pytest.mark.slow
def test_site_has_no_broken_link(site): assert not list(broken(site))


def test_broken_links_are_found(tmp_path):
    (tmp_path/"a.html").write_text('<h1 id="x"></h1><a href="#x"></a><a href="b.html#y"></a><a href="c.html"></a><img src="d.png"><script src="https://cdn/e.js"></script>')
    (tmp_path/"b.html").write_text('<a href="a.html#x"></a>')
    assert [ref for _, ref in broken(tmp_path)] == ["b.html#y", "c.html", "d.png", "https://cdn/e.js"]


@pytest.mark.slow
def test_site_has_every_page(site):
    notebooks = [p.relative_to(root/"nbs").with_suffix(".html") for p in [*(root/"nbs").glob("*.ipynb"), *(root/"nbs").glob("[0-9t]*/*.ipynb")]]
    assert not [p for p in notebooks if not (site/p).exists()]
    assert (site/"_images"/"demo.png").exists() and (site/"_images"/"dashboard.png").exists() and (site/"searchindex.js").exists()
    ids = {i for p in (site/"reference").glob("*.html") for i in Page(p).ids}
    assert not [f"{m}.{name}" for m, loaded in reference.load().items() for name in loaded.__all__ if f"mdl_nbdev.{m}.{name}" not in ids]
    options = Page(site/"commands.html").ids
    assert not [(c, a.dest) for c in reference.commands for a in reference.command_parser(c)._actions if a.option_strings and reference.anchor(c, a.option_strings[-1]) not in options]
    assert not re.search(r"#\| *(hide|export|default_exp|data|slow|gpu)\b", (site/"1_data"/"08_tables.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_controls_are_called_what_they_show(site):
    "A label that hides a control's text names it otherwise for a screen reader"
    text = (site/"index.html").read_text() + (site/"5_cli"/"04_watch.html").read_text()
    assert "<summary" in text and "search-button-field" in text
    assert not re.search(r'<(summary|button class="btn search-button-field)[^>]*aria-label', text)


@pytest.mark.slow
def test_styles_meet_what_they_are_for(site):
    "The theme and the parser decide on the classes of tables; and a plot says that it is one, not the name of its file"
    text = "".join((site/page).read_text() for page in ("commands.html", "1_data/03_audio.html", "tutorials/02_labels_you_can_see.html", "index.html"))
    css = (root/"docs"/"static"/"site.css").read_text()
    classes = {c for found in re.findall(r'<(?:table|p)\b[^>]*?class="([^"]*)"', text) for c in found.split()}
    assert not set(re.findall(r"(?:table|p)\.(\w+)", css)) - classes
    pictures = re.findall(r'<a class="picture"[^>]*>(<img [^>]*>)</a>', text) # on a phone they scroll, so they take the focus
    assert len(pictures) == len(re.findall(r"<img [^>]*_images/", text)) > 3 and not re.search(r'alt="[^"]*_images/', text)
