"`python docs/build.py [FOLDER]`: build the site from the notebooks, as their outputs are stored, and from the package; warnings are errors"
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from reference import chapters, commands_page, entry, escape, load, module_page, modules, part, reference_index, root
from sphinx.cmd.build import main as sphinx

nbs = root/"nbs"
repository = "https://github.com/mdl-nbdev/mdl_nbdev/blob/main/"


def pages(): # The notebooks of the site
    "Chapters and tutorials in order, as paths inside nbs/"
    return [p.relative_to(nbs) for folder in (nbs, *sorted(nbs.glob("[0-9]_*")), nbs/"tutorials") for p in sorted(folder.glob("*.ipynb"))]


def public_names():
    "Name -> link target, for names that only one module has"
    found = {}
    for m in load().values():
        for public in m.__all__: found.setdefault(public, []).append(f"{m.__name__}.{public}")
    return {k: v[0] for k, v in found.items() if len(v) == 1}


def linked(text, names): # Markdown; from `public_names`
    "Link each public name in backticks to its reference; headings, links and code blocks stay"
    parts = re.split(r"(^```.*?^```|^(?:    |#).*?$|\[[^\]\n]*\]\([^)\n]*\))", text, flags=re.M | re.S)
    return "".join(p if i % 2 else re.sub(r"(?<![`\[])`(\w+)`(?![`\]])", lambda m: f"[`{m[1]}`](#{names[m[1]]})" if m[1] in names else m[0], p)
                   for i, p in enumerate(parts))


def markdown(cell, page, names): # A prose cell, its page's path, from `public_names`
    "Rewrite links to the repository's notebooks as links inside the site, mark the subtitle, link public names"
    up = "../" * (len(page.parts) - 1)
    def inside(m): return f"]({up}{m[1]}{m[2]})" if (nbs/m[1]).exists() else m[0]
    text = re.sub(rf"\]\({re.escape(repository)}nbs/([\w/.-]+\.ipynb)(#[\w-]+)?\)", lambda m: inside([m[0], m[1], m[2] or ""]), cell.source)
    text = re.sub(r"\A(# .*\n+)> (.+)", r"\1{.lead}\n\2", text)
    cell.source = linked(text, names)
    return cell


def api(cell, module, names): # An exported cell, its module, from `public_names`
    "What an exported cell defines, described as in the reference, in front of its source, which is folded"
    m = load()[module]
    defined = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", cell.source, re.M) if "@patch" not in cell.source else []
    for name in defined:
        if name not in m.__all__: continue
        text = entry(getattr(m, name), name, None, ":no-index:", ":no-contents-entry:")
        yield nbformat.v4.new_markdown_cell(f"{text}\n{{.see}}\n[Reference](#{m.__name__}.{name})")
    what = ", ".join(re.findall(r"^(?:def|class) (\w+)", cell.source, re.M)) or ", ".join(re.findall(r"^([A-Za-z_]\w*) *=", cell.source, re.M)) or "imports"
    cell.metadata = dict(tags=["hide-input"], mystnb=dict(code_prompt_show=f"Source: {what}", code_prompt_hide=f"Source: {what}"))
    yield cell


def joined(outputs): # Of a cell
    "The outputs that show something; what a process printed in several pieces as one text, or lines would be broken where a piece ends"
    out = []
    for o in outputs:
        if "data" in o and not any(v.strip() for v in o.data.values() if isinstance(v, str)): continue # a widget, whose HTML is another output
        if out and o.output_type == "stream" == out[-1].output_type and o.name == out[-1].name: out[-1].text += o.text
        else: out.append(o)
    return out


def notebook(page, names): # Its path inside nbs/, from `public_names`
    "A notebook as a page: hidden cells and directives left out, exported cells folded"
    nb = nbformat.read(nbs/page, 4)
    module = next((m[1] for c in nb.cells if (m := re.search(r"^#\| *default_exp +(\S+)", c.source, re.M))), None)
    cells = []
    for c in nb.cells:
        flags = set(re.findall(r"^#\| *(\w+)", c.source, re.M))
        if flags & {"hide", "default_exp"}: continue
        if c.cell_type == "code":
            tags = dict(echo="remove-input", hide_output="remove-output") # of cells that say `echo: false` or `hide_output`
            tags = [tag for flag, tag in tags.items() if flag in flags]
            c.source = re.sub(r"^#\| .*\n?", "", c.source, flags=re.M).strip("\n")
            c.outputs = joined(c.outputs)
            if tags: c.metadata = dict(tags=tags)
            if any("image/png" in o.get("data", {}) for o in c.outputs): c.metadata["mystnb"] = dict(image=dict(alt="Plot made by this code"))
            if c.source or c.outputs: cells += api(c, module, names) if flags & {"export", "exporti", "exports"} else [c]
        elif c.cell_type == "markdown": cells.append(markdown(c, page, names))
    nb.cells = cells
    nb.metadata = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"), language_info=dict(name="python", pygments_lexer="ipython3"))
    return nb


def heading(page): # Its path inside nbs/
    "Title and subtitle of a notebook"
    title, _, subtitle = nbformat.read(nbs/page, 4).cells[0].source.partition("\n")
    return title.strip("# "), subtitle.strip("\n> ")


def page_list(listed, *options): # Pages, and options of their `toctree`
    "A table of pages with their subtitles, and their entries in the navigation"
    rows = "\n".join(f"| [{heading(p)[0]}](/{p.as_posix()}) | {escape(heading(p)[1])} |" for p in listed)
    toc = "\n".join([*options, ":hidden:", "", *(f"/{p.with_suffix('').as_posix()}" for p in listed)])
    return f"| Page | What it explains |\n|---|---|\n{rows}\n\n```{{toctree}}\n{toc}\n```\n"


def guides(listed): # Pages of the tutorials
    "The first page of the guides: what somebody wants to do, and where that is explained"
    toc = "\n".join(["```{toctree}", ":hidden:", "", *(f"/{p.with_suffix('').as_posix()}" for p in listed), "```"])
    return f"{(root/'docs'/'guides.md').read_text(encoding='utf-8')}\n{toc}\n"


def guide(listed): # The pages of all chapters, in order
    "The first page of the chapters, by part, each part with what it is for"
    text = "# How it works\n\n{.lead}\nOne chapter for each module: what it defines, why, and examples that run\n\n"
    text += "The package has five parts on a common base. A chapter uses only what earlier chapters define, so they can be read in order.\n"
    for folder in dict.fromkeys(p.parent for p in listed):
        title, about = part(folder.name)
        text += f"\n## {title}\n\n{escape(about)}.\n\n" + page_list([p for p in listed if p.parent == folder], f":caption: {title}")
    return text


def write(source): # An empty folder
    "Write the sources that Sphinx reads"
    names, everything = public_names(), pages()
    for page in everything:
        nb = notebook(page, names)
        if page.name == "index.ipynb":
            toc = "\n".join(["tutorials/index", "guide", "commands", "reference/index", "changelog", "中文 <index_zh>"])
            nb.cells.append(nbformat.v4.new_markdown_cell(f"```{{toctree}}\n:hidden:\n\n{toc}\n```"))
        (source/page).parent.mkdir(exist_ok=True)
        nbformat.write(nb, source/page)
    for name in modules:
        (source/"reference").mkdir(exist_ok=True)
        (source/"reference"/f"{name}.md").write_text(linked_reference(name, names), encoding="utf-8")
    numbered = [p for p in everything if p.as_posix() in {v[0] for v in chapters().values()}]
    texts = {"reference/index.md": reference_index(), "commands.md": commands_page(), "guide.md": guide(numbered),
             "tutorials/index.md": guides([p for p in everything if p.parent.name == "tutorials"]),
             "changelog.md": (root/"CHANGELOG.md").read_text(encoding="utf-8")}
    for name, text in texts.items(): (source/name).write_text(text, encoding="utf-8")
    for folder in ("images", "tutorials/images"):
        if (nbs/folder).exists(): shutil.copytree(nbs/folder, source/folder)


def linked_reference(name, names): # A module's name, from `public_names`
    "The page of a module, public names in its prose linked"
    lines = module_page(name).split("\n")
    return "\n".join(s if s.startswith(("`", ":", "#", "{", "| `")) else linked(s, names) for s in lines)


def finish(page): # An HTML file
    "Remove the theme's labels of controls that have a text, so that a screen reader says what is on the screen; link pictures to themselves"
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'(<(?:summary|button class="btn search-button-field)[^>]*?) aria-label="[^"]*"', r"\1", text)
    def link(m): return m[0] if m[1] else f'<a class="picture" href="{m[3]}">{m[2]}</a>'
    text = re.sub(r'(<a [^>]*>\s*)?(<img [^>]*src="([^"]*_images/[^"]*)"[^>]*>)', link, text)
    page.write_text(text, encoding="utf-8")


def build(out): # The site's folder
    "Build the site; the exit code"
    with tempfile.TemporaryDirectory() as tmp:
        source, html = Path(tmp)/"source", Path(tmp)/"html"
        source.mkdir()
        write(source)
        code = sphinx(["-b", "html", "-W", "--keep-going", "-q", "-j", "2", "-c", str(Path(__file__).parent), "-d", f"{tmp}/doctrees", str(source), str(html)])
        if code: return code
        for page in html.rglob("*.html"): finish(page)
        (html/".nojekyll").touch() # a forge's pages keep folders that begin with an underscore
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(html, out)
    return 0


if __name__ == "__main__":
    out = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent/"_site"
    if code := build(out): sys.exit(code)
    print(f"The site is in {out}: open {out/'index.html'}")
