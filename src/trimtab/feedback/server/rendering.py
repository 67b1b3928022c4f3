"""Texts of models and strangers as HTML that can do nothing: Markdown, code and LaTeX, but no links and no images.

Three protections are each sufficient alone: the parser escapes HTML, the result is cleaned to a list of allowed
elements, and the page's security policy runs no script of the text and loads nothing from elsewhere.
"""

from __future__ import annotations

import functools
import html
import re
from itertools import accumulate
from typing import Any

import latex2mathml.converter
import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from trimtab.reports.markup import visible

MAX_MATH = 2_000
"""Letters of one formula; a longer one is shown as its source."""
MAX_HIGHLIGHTED = 6_000
"""Letters of code in a text up to which it is coloured: the time of some lexers grows with their square."""
MAX_CELLS = 3_000
"""Most cells of all tables of a text that are drawn. Short rows are filled up with cells, so few letters make many."""
_MAX_NESTING = 30

_MATH_ELEMENTS = {
    "math", "semantics", "mrow", "mi", "mn", "mo", "mtext", "mspace", "ms", "mfrac", "msqrt", "mroot", "mstyle",
    "merror", "mpadded", "mphantom", "msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts",
    "mtable", "mtr", "mtd", "menclose",
}  # fmt: skip
_ELEMENTS = {
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong",
    "s", "del", "table", "thead", "tbody", "tr", "th", "td", "span", "div",
} | _MATH_ELEMENTS  # fmt: skip
_ATTRIBUTES = {
    "math": {"display"},
    "mo": {"stretchy", "fence", "form", "lspace", "rspace"},
    "mi": {"mathvariant"},
    "mtd": {"columnalign"},
    "mspace": {"width"},
    "mfrac": {"linethickness"},
    "ol": {"start"},
    "span": {"class"},
    "div": {"class"},
    "code": {"class"},
}
_CLASS = re.compile(r"[a-z][a-z0-9-]{0,20}( [a-z][a-z0-9-]{0,20}){0,2}")
_DELIMITERS = set("|:- >\t*+.0123456789")
"""The characters that a line that begins a table may hold, with the signs of lists and quotes before it."""


@functools.lru_cache(maxsize=512)
def render(text: str) -> Markup:
    """The text as safe HTML."""
    shown = visible(text)
    parser = _parser(_num_cells(shown) <= MAX_CELLS)
    tokens = parser.parse(shown)
    num_coloured = sum(len(token.content) for token in tokens if token.type == "fence")
    options: Any = {**parser.options, **({} if num_coloured <= MAX_HIGHLIGHTED else {"highlight": None})}
    return Markup(_clean(str(parser.renderer.render(tokens, OptionsDict(options), {}))))


def _num_cells(text: str) -> int:
    """An upper bound on the cells in all tables of the text: for each line under which a table can begin, its columns
    times the lines down to the next empty one."""
    num = columns = 0
    for line in text.splitlines():
        if not line.strip(" >\t"):
            columns = 0
        elif "|" in line and "-" in line and set(line) <= _DELIMITERS:
            columns = max(columns, line.count("|") + 1)
        num += columns
    return num


def _clean(dirty: str) -> str:
    return nh3.clean(
        dirty,
        tags=_ELEMENTS,
        attributes=_ATTRIBUTES,
        attribute_filter=_attribute,
        url_schemes=set(),
        strip_comments=True,
        link_rel=None,
    )


def _attribute(_: str, name: str, value: str) -> str | None:
    if name == "class":
        return value if _CLASS.fullmatch(value) else None
    return value if re.fullmatch(r"[\w.%-]{1,24}", value) else None


@functools.cache
def _parser(tables: bool) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _highlighted, "maxNesting": 60})
    parser.enable(["table", "strikethrough"] if tables else ["strikethrough"])
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True, renderer=_math)
    parser.add_render_rule("link_open", _link_open)
    parser.add_render_rule("link_close", _link_close)
    parser.add_render_rule("image", _image)
    return parser


def _highlighted(code: str, language: str, _: str) -> str:
    """Code with a class for each kind of word; plain if the language is not known."""
    if not language or not re.fullmatch(r"[\w+#.-]{1,30}", language):
        return html.escape(code)
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return html.escape(code)
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix="c-")))


def _math(source: str, options: dict[str, Any]) -> str:
    """LaTeX as MathML, which browsers draw themselves; what cannot be read is shown as its source."""
    display = "block" if options.get("display_mode") else "inline"
    if len(source) <= MAX_MATH and _nesting(source) <= _MAX_NESTING and not re.search(r"<[A-Za-z/!?]", source):
        try:
            return str(latex2mathml.converter.convert(source, display=display))
        except Exception:  # whatever a stranger's formula makes the converter raise, its source can be shown
            pass
    return f'<code class="math-source">{html.escape(source)}</code>'


def _nesting(source: str) -> int:
    return max(accumulate(({"{": 1, "}": -1}.get(letter, 0) for letter in source), initial=0))


def _link_open(_: Any, tokens: list[Token], index: int, *__: Any) -> str:
    return '<span class="link">'


def _link_close(_: Any, tokens: list[Token], index: int, *__: Any) -> str:
    """The address of the link as text: nobody should follow an address that a model made up."""
    depth, i = 0, index
    while True:
        depth += {"link_close": 1, "link_open": -1}.get(tokens[i].type, 0)
        if depth == 0:
            break
        i -= 1
    return f'</span> <span class="address">⟨{html.escape(str(tokens[i].attrs.get("href", "")))}⟩</span>'


def _image(_: Any, tokens: list[Token], index: int, *__: Any) -> str:
    source = html.escape(str(tokens[index].attrs.get("src", ""))[:200])
    return f'<span class="address">[image: {html.escape(tokens[index].content)} ⟨{source}⟩]</span>'
