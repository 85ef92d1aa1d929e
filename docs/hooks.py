"""What the documentation site takes from outside this folder, and formulas as MathML.

The site is laid out as the repository is, with this folder at its root: `notebooks/01_quickstart.ipynb` and
whatever picture or file a page links to lie at their own paths. So links work here and there alike.
"""

import html
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import stam_jax

ROOT = Path(__file__).parent.parent
# Files of the repository that have a page of their own on the site.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
# There the commands have names of their own, some of which are names of functions, too.
UNLINKED = ("experiments.md",)

_INCLUDE = re.compile(r"^<!-- from README.md: (.+) -->$", re.MULTILINE)
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:)[^)\s#]+")
_MATHS = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.+?)\\[)\]]\s*</\1>', re.DOTALL)
_CODE = re.compile(r"<(a|pre|h\d|autoref|script|style)\b.*?</\1>|<code>([\w.]+)(\(.*?\))?</code>", re.DOTALL)

_CELL = re.compile(r'<div[^>]*data-mime-type="text/markdown".*?\n</div>', re.DOTALL)
_CELL_CODE = re.compile(r"(<pre\b.*?</pre>|<code\b.*?</code>)", re.DOTALL)
_CELL_MATHS = re.compile(r"\$\$(.+?)\$\$|\$(?=\S)([^$]+?)(?<=\S)\$(?!\d)", re.DOTALL)
_SCRIPT = re.compile(r"<script\b[^>]*>.*?</script>", re.DOTALL)
_FOREIGN_PICTURE = re.compile(r'<img\b[^>]*\bsrc="https?:[^>]*>')

_mathml = LatexToMathML(fancy_error=False)


def _relinked(text: str, change: Callable[[str], str]) -> str:
    """A page with its links to files changed, but for what is in fenced code."""
    pieces = _FENCE.split(text)
    pieces[::2] = (_LINK.sub(lambda link: change(link[0]), piece) for piece in pieces[::2])
    return "".join(pieces)


def _filled(text: str) -> str:
    """A page with the sections of the README that it asks for, their links as from this folder."""

    def section(match: re.Match[str]) -> str:
        _, *parts = re.split(r"^## (.+)\n", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
        bodies = dict(zip(parts[::2], parts[1::2], strict=True))
        if match[1] not in bodies:
            raise PluginError(f"README.md has no section {match[1]!r}; it has {', '.join(bodies)}.")
        return _relinked(bodies[match[1]].strip(), lambda link: posixpath.relpath(link, "docs"))

    return _INCLUDE.sub(section, text)


def _beyond(link: str, page: str) -> str | None:
    """Where in the repository a link of a page leads, if that is not to this folder."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if target.startswith("docs/") else target


def _targets(page: str, text: str) -> set[str]:
    """All that a page links to beyond this folder."""
    links: list[str] = []
    _relinked(_filled(text), lambda link: links.append(link) or link)
    return {place for link in links if (place := _beyond(link, page)) is not None}


@event_priority(100)  # Before what is a notebook is made a page.
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks, the changes, and what pages link to."""
    places = {"CHANGELOG.md", *(f"notebooks/{path.name}" for path in ROOT.glob("notebooks/*.ipynb"))}
    for file in files.documentation_pages():
        places |= _targets(file.src_uri, file.content_string)
    for place in sorted(places - {"README.md"}):
        path = ROOT / place
        if not path.is_file():
            raise PluginError(f"A page links to {place}, which is no file.")
        if place in PAGES:
            files.append(File.generated(config, PAGES[place], abs_src_path=str(path)))
        else:
            files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is taken from the README, and lead links beyond this folder to their places here."""
    own = page.file.src_uri

    def moved(link: str) -> str:
        place = _beyond(link, own)
        if place is None:
            return link
        return posixpath.relpath(PAGES.get(place, place), posixpath.dirname(own) or ".")

    if own == PAGES["CHANGELOG.md"]:
        markdown = _relinked(markdown, lambda link: posixpath.relpath(link, "docs"))
    return _relinked(_filled(markdown), moved)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw formulas, and link names of the library to the reference."""
    own = page.file.src_uri
    if own.endswith(".ipynb"):
        content = _notebook(content, page, files)
    content = _MATHS.sub(lambda match: _formulas(match[3], display=match[2] == "[", page=own), content)
    return content if own in UNLINKED else _CODE.sub(_linked, content)


@event_priority(-100)  # After the notebooks' renderer has put its own in.
def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Leave out the scripts that would load others from elsewhere: formulas need none."""
    return _SCRIPT.sub(lambda script: "" if "https://cdn" in script[0] else script[0], output)


def _formulas(latex: str, *, display: bool, page: str) -> str:
    """A formula as MathML; or several, where one line of display follows another."""
    parts = [part.strip() for part in html.unescape(latex).split("$$")]
    try:
        return "".join(_mathml.convert_with_local_state(part, displaystyle=display) for part in parts if part)
    except LatexError as error:
        raise PluginError(f"{page}: {latex!r} is no formula: {error}") from error


def _linked(match: re.Match[str]) -> str:
    """A name of the library in code, linked to where it is explained."""
    name = match[2] and match[2].removeprefix("stam_jax.")
    if not name or name.split(".")[0] not in stam_jax.__all__:
        return match[0]
    # Optional, for some names are none but look like one: a field, a method, a module.
    return f'<autoref identifier="stam_jax.{name}" optional>{match[0]}</autoref>'


def _notebook(content: str, page: Page, files: Files) -> str:
    """A notebook without pictures from elsewhere, its formulas and links as on other pages."""
    own = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join("notebooks", match[1]))
        target = files.get_file_from_path(PAGES.get(place, place.removeprefix("docs/")))
        if target is None:
            raise PluginError(f"{own} links to {match[1]}, which is not on the site.")
        return f'href="{target.url_relative_to(page.file)}'

    def formula(match: re.Match[str]) -> str:
        return _formulas(match[1] or match[2], display=match[1] is not None, page=own)

    def prose(cell: re.Match[str]) -> str:
        pieces = _CELL_CODE.split(cell[0])
        pieces[::2] = (_CELL_MATHS.sub(formula, piece) for piece in pieces[::2])
        return re.sub(r'href="(?![a-z]+:|#)([^"#]+)', link, "".join(pieces))

    content = _FOREIGN_PICTURE.sub(lambda tag: "".join(re.findall(r'\balt="(.*?)"', tag[0])), content)
    return _CELL.sub(prose, content)
