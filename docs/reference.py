"The pages that are made from code: the API reference from signatures and docments, the command-line reference from the parsers"
import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys
from pathlib import Path

import nbformat
from fastcore.docments import docments

root = Path(__file__).parent.parent
sys.path.insert(0, str(root)) # the package of this checkout is the one described
package = "mdl_nbdev"
modules = sorted(".".join(p.relative_to(root/package).with_suffix("").parts) for p in (root/package).rglob("*.py") if not p.stem.startswith("_") and p.name != "all.py")
commands = re.findall(rf"^\s*(?:console_scripts = )?(\w+)={package}\.cli\.commands:", (root/"settings.ini").read_text(encoding="utf-8"), re.M)
EMPTY = inspect.Parameter.empty
PLAIN = ("required", "half the cores") # said in words, not as code


@functools.cache
def load(): return {m: importlib.import_module(f"{package}.{m}") for m in modules} # all at once: `@patch` adds methods from any of them


def escape(text): # A comment or docstring, in which backticks mark code
    "`text` as Markdown that means what it says, also in the cell of a table"
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    return "".join(p.replace("|", r"\|") if i % 2 else re.sub(r"([\\*_<>\[\]|$#{}~])", r"\\\1", p) for i, p in enumerate(parts))


def code(text): # A value or type
    "`text` as inline code in the cell of a table"
    text = " ".join(str(text).split()).replace("|", r"\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`" if text else ""


def type_name(anno): # An annotation
    "A type as one writes it, without the modules' names"
    if anno in (EMPTY, None): return ""
    text = anno if isinstance(anno, str) else inspect.formatannotation(anno)
    return re.sub(r"\s*\|\s*", "|", re.sub(r"(?:\w+\.)+(?=[A-Za-z_])", "", text).replace("'", ""))


def value_name(value, most=44): # A default or a constant
    "A value as one writes it; its beginning, if it is long"
    if value is EMPTY: return "required"
    if inspect.isroutine(value) or inspect.isclass(value): return value.__name__
    text = repr(str(value)) if isinstance(value, Path) else repr(value)
    if isinstance(value, (set, frozenset)): text = f"{{{', '.join(sorted(map(repr, value)))}}}" # the same in every build
    if re.search(r"<.* at 0x|^<", text): return type(value).__name__
    return text if len(text) <= most else text[:most] + "…"


@dataclasses.dataclass
class Param:
    "A parameter as tables show it"
    name:str
    type:str
    default:str
    meaning:str


def field_params(cls): # A dataclass
    "The fields of a dataclass, inherited ones among them"
    docs = {}
    for c in reversed(cls.__mro__):
        if "__annotations__" in vars(c): docs.update({k: v for k, v in docments(c, returns=False).items() if k in vars(c)["__annotations__"]})
    for f in dataclasses.fields(cls):
        if not f.init or f.name.startswith("_"): continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else EMPTY if f.default is dataclasses.MISSING else f.default
        shown = "half the cores" if getattr(f.default_factory, "__name__", "") == "half_the_cores" else value_name(default) # not this machine's number
        yield Param(f.name, type_name(f.type), shown, " ".join((docs.get(f.name) or "").split()))


def parameters(o): # A function or class
    "The parameters of its signature, without the object or class that a method belongs to"
    found = list(inspect.signature(o).parameters.items())
    return found[1:] if found and found[0][0] in ("self", "cls") and "." in o.__qualname__ else found


@functools.cache # each is shown in the reference and in the guide, and finding comments means reading source
def params(o): # A function or class
    "The parameters of `o` and what it returns, each with its comment"
    if dataclasses.is_dataclass(o): return list(field_params(o)), None
    if inspect.isclass(o) and not any("__init__" in vars(c) for c in o.__mro__ if c.__module__.startswith(package)): return [], None
    if inspect.isclass(o) and "__init__" not in vars(o): o = next(c for c in o.__mro__ if "__init__" in vars(c))
    docs = docments(o, full=True)
    found = []
    for name, p in parameters(o):
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        found.append(Param(stars + name, type_name(p.annotation), "" if stars else value_name(p.default), " ".join(((docs.get(name) or {}).get("docment") or "").split())))
    returned = docs.get("return") or {}
    result = Param("", type_name(returned.get("anno")), "", returned.get("docment") or "")
    return found, result if not inspect.isclass(o) and (result.type or result.meaning) else None


def call(o): # A function or class
    "The signature of `o` without types, which its table has"
    if inspect.isclass(o) and not params(o)[0]: return ""
    if dataclasses.is_dataclass(o) and len(params(o)[0]) > 10: return "(**settings)"
    shown, keyword = [], False
    for name, p in parameters(o):
        if p.kind is p.KEYWORD_ONLY and not keyword and not any(s.startswith("*") for s in shown): shown.append("*")
        keyword |= p.kind is p.KEYWORD_ONLY
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is EMPTY else f"={value_name(p.default, 24)}"
        shown.append(f"{stars}{name}{default if not re.search('…|<|_HAS_DEFAULT_FACTORY', default) else '=...'}")
    return f"({', '.join(shown)})"


def table(found, returned): # From `params`
    "The table of parameters; '' where there is nothing to say"
    if not any(p.type or p.meaning for p in found) and not returned: return ""
    rows = [(code(p.name), code(p.type), p.default if p.default in PLAIN else code(p.default), escape(p.meaning)) for p in found]
    if returned: rows.append(("*returns*", code(returned.type), "", escape(returned.meaning)))
    lines = ["| Parameter | Type | Default | Meaning |", "|---|---|---|---|", *("| " + " | ".join(r) + " |" for r in rows)]
    return "```{table}\n:class: params\n\n" + "\n".join(lines) + "\n```\n"


def summary(o): # Anything with a docstring of its own
    "The docstring of `o` as Markdown"
    text = (o.__doc__ if inspect.isclass(o) else inspect.getdoc(o)) or ""
    return escape(inspect.cleandoc(text)) + "\n" if text else ""


def methods(cls): # A class of this package
    "Its public methods and properties as (name, kind, object), those that `@patch` added among them"
    for name, v in vars(cls).items():
        if name.startswith("_") and name != "__call__" or dataclasses.is_dataclass(cls) and name in {f.name for f in dataclasses.fields(cls)}: continue
        if isinstance(v, property): yield name, "property", v.fget
        elif isinstance(v, (classmethod, staticmethod)): yield name, type(v).__name__, v.__func__
        elif inspect.isfunction(v): yield name, "method", v
        elif hasattr(v, "func") and callable(v.func): yield name, "property", v.func # a cached property
        elif callable(getattr(v, "f", None)): yield name, "classmethod", v.f # added by `@patch(cls_method=True)`


def attributes(cls): # A class of this package
    "The attributes that it declares with a comment, behind them or in the lines before, as (name, value, comment)"
    comment = []
    for line in inspect.getsource(cls).splitlines():
        m = re.match(r"    (\w+) = (.+?)(?: # (.+))?$", line)
        if m and not m[1].startswith("_") and (m[3] or comment): yield m[1], m[2], " ".join([*comment, *filter(None, [m[3]])])
        comment = [*comment, line.strip("# ")] if re.match(r"    # ", line) else []


def directive(kind, signature, body, module, *options, fence="```"):
    "An object's description in Sphinx's words"
    return "\n".join([f"{fence}{{py:{kind}}} {signature}", *([f":module: {module}"] if module else []), *options, "", body.rstrip(), fence, ""])


def entry(o, name, module, *options): # A function or class, its name and its module's name; without a module it is no link's target
    "The description of a function or class: signature, docstring, parameters, and a class's methods"
    body = summary(o) + "\n" + table(*params(o))
    if not inspect.isclass(o): return directive("function", f"{name}{call(o)}", body, module, *options, fence="````")
    bases = [b for b in o.__bases__ if b.__module__.startswith(package) and not b.__name__.startswith("_")]
    if bases: body = "Also has what " + ", ".join(f"[`{b.__name__}`](#{b.__module__}.{b.__name__})" for b in bases) + f" {'has' if len(bases) == 1 else 'have'}.\n\n" + body
    if not dataclasses.is_dataclass(o):
        for attribute, value, comment in attributes(o): body += "\n" + directive("attribute", f"{name}.{attribute}", f"{escape(comment)} (default: {code(value)})", module, *options)
    for method, kind, f in methods(o):
        marks = [f":{kind}:"] if kind in ("classmethod", "staticmethod") else []
        if kind == "property": inner = directive("property", f"{name}.{method}", summary(f), module, *options, fence="````")
        else: inner = directive("method", f"{name}.{method}{call(f)}", summary(f) + "\n" + table(*params(f)), module, *marks, *options, fence="````")
        body += "\n" + inner
    return directive("class", f"{name}{call(o)}", body, module, *options, fence="`````")


def constant(m, name): # A module and the name of a value in it
    "The description of a constant: its value and the comment behind it"
    source = inspect.getsource(m)
    line = next((s for s in source.splitlines() if re.match(rf"{name}\b.* = ", s) or s.startswith(f"{name} =")), "")
    comment = re.search(r"['\")\w\].] +# (.+)$", line)
    value = value_name(getattr(m, name), 60)
    return directive("data", name, (escape(comment[1]) + "\n\n" if comment else "") + f"{code(value)}\n", m.__name__)


@functools.cache # each call would read all notebooks
def chapters(): # From the notebooks
    "Module -> (notebook's path inside nbs/, title, subtitle)"
    found = {}
    for path in sorted((root/"nbs").glob("[0-9]_*/*.ipynb")):
        cells = nbformat.read(path, 4).cells
        module = next((m[1] for c in cells if (m := re.search(r"^#\| *default_exp +(\S+)", c.source, re.M))), None)
        title, _, subtitle = cells[0].source.partition("\n")
        if module: found[module] = path.relative_to(root/"nbs").as_posix(), title.strip("# "), subtitle.strip("\n> ")
    return found


@functools.cache # each call would parse all modules
def imported_names(): # From the sources
    "Names that one module of the package imports from another"
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in (root/package).rglob("*.py") if not p.stem.startswith("_")]
    return {a.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for a in node.names}


def most_called(m): # A module
    "Its public names: those that notebooks import from the package, those that other modules import, the others; constants come last in each"
    def rank(name): return name not in importlib.import_module(package).__all__, name not in imported_names(), not callable(getattr(m, name))
    return sorted(m.__all__, key=rank)


def module_page(name): # A module's name
    "The reference of one module as MyST Markdown; what people call comes first"
    m, (notebook, title, subtitle) = load()[name], chapters()[name]
    parts = [f"# {name}\n", f"{{.lead}}\n{subtitle}\n", f"The chapter [{title}](../{notebook}) explains it with examples.\n", f"```{{py:module}} {m.__name__}\n```\n"]
    for public in most_called(m):
        o = getattr(m, public)
        parts.append(entry(o, public, m.__name__) if inspect.isfunction(o) or inspect.isclass(o) else constant(m, public))
    return "\n".join(parts)


def part(folder): # Such as `1_data`
    "Title of a part and what it is for, from the docstring of its package"
    name = folder.partition("_")[2]
    return {"cli": "Command line and dashboards"}.get(name, name.capitalize()), importlib.import_module(f"{package}.{name}").__doc__


def called(inside): # Modules
    "A table of what notebooks import from the package itself and these modules define; '' if there is nothing"
    short = importlib.import_module(package).__all__
    defined = [(m, name) for m in inside for name in most_called(load()[m]) if name in short]
    rows = [f"| [`{name}`](#{package}.{m}.{name}) | {summary(getattr(load()[m], name)).partition(chr(10))[0]} |" for m, name in sorted(defined, key=lambda d: short.index(d[1]))]
    return "\n".join(["| From `mdl_nbdev` | What it does |", "|---|---|", *rows, "", ""]) if rows else ""


def reference_index():
    "What people call, and the list of modules, by part; the base comes last"
    about, text = chapters(), "# API reference\n\n{.lead}\nWhat notebooks import from `mdl_nbdev`, and every public name of every module\n"
    folders = {}
    for m in sorted(modules, key=lambda m: about[m][0]): folders.setdefault(about[m][0].partition("/")[0], []).append(m)
    for folder in sorted(folders, key=lambda folder: (folder[0] == "0", folder)):
        inside = folders[folder]
        rows = "\n".join(f"| [`{m}`]({m}.md) | {escape(about[m][2])} |" for m in inside)
        toc = "\n".join([f":caption: {part(folder)[0]}", ":hidden:", "", *inside])
        text += f"\n## {part(folder)[0]}\n\n{called(inside)}| Module | What it has |\n|---|---|\n{rows}\n\n```{{toctree}}\n{toc}\n```\n"
    return text


def command_parser(command): # A console script's name
    "The parser that the console script itself uses"
    commands, line = (importlib.import_module(f"{package}.{m}") for m in ("cli.commands", "base.command_line"))
    seen, real = [], commands.run_command
    commands.run_command = lambda prog, function, cls, argv: seen.append(line.parser(cls, prog))
    try: getattr(commands, command)([])
    finally: commands.run_command = real
    return seen[0]


def arguments(parser): # An ArgumentParser
    "Its options by group, as (title, [(name, value, default, help)])"
    for group in parser._action_groups:
        rows = []
        for a in group._group_actions:
            text, default = re.fullmatch(r"(.*?)(?: \[([^\[]*)\]| \((required)\))?", (a.help or "").replace("%%", "%"), re.S).groups()[:2]
            if a.help.endswith(" (required)"): text, default = a.help.removesuffix(" (required)"), "required"
            if a.dest == "num_workers": default = "half the cores" # the parser has this machine's number
            rows.append((a.option_strings[-1] if a.option_strings else a.metavar, "" if a.nargs == 0 or not a.option_strings else a.metavar or "", default or "", text))
        if rows: yield {"options": "General", "positional arguments": "Arguments"}.get(group.title, group.title), rows


def anchor(command, name): return f"{command.replace('_', '-')}-{name.strip('-').lower()}" # Of an option on the page of commands


def commands_page():
    "The command-line reference as MyST Markdown"
    parts = ["# Commands\n", "{.lead}\nEvery option of every console script, as `--help` shows it\n", "| Script | |\n|---|---|"]
    parsers = {c: command_parser(c) for c in commands}
    parts += [f"| [`{c}`](#{c.replace('_', '-')}) | {escape(p.description)} |" for c, p in parsers.items()]
    parts += ["", re.sub(r"--\S*\w", r"`\g<0>`", next(iter(parsers.values())).epilog) + " `--config FILE` reads settings from a YAML or JSON file, by the same names; options given on the command line win over it.\n"]
    for command, p in parsers.items():
        parts += [f"({command.replace('_', '-')})=", f"## {command}\n", escape(p.description) + ".\n"]
        for title, rows in arguments(p):
            parts += [f"{{.group}}\n**{escape(title)}**\n", "```{table}\n:class: options\n", "| Option | Value | Default | Meaning |", "|---|---|---|---|"]
            parts += [f"| {code(n)}{{#{anchor(command, n)}}} | {code(v)} | {d if d in PLAIN else code(d)} | {escape(text)} |" for n, v, d, text in rows] + ["```\n"]
    return "\n".join(parts)
