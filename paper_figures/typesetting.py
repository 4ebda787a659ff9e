"""A table as Markdown and as LaTeX (booktabs, array): $a formula$ in plain letters is code there and math here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from analysis.markdown import markdown
from experiments.files import write_text

ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_\allowbreak{}", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$",
    "|": "$|$", "\N{MULTIPLICATION SIGN}": r"$\times$", "=": r"=\allowbreak{}",
}  # fmt: skip
_SYMBOLS = {
    "theta": r"\theta", "lambda": r"\lambda", "Lambda": r"\Lambda", "Pi": r"\Pi", "sum": r"\sum", "log": r"\log",
    "kron": r"\otimes", "max": r"\max", "min": r"\min", "x": r"\times", "*": r"\cdot", "~": r"\sim", "..": r"\dots",
    "||": r"\Vert", "|": r"\vert", "%": r"\%", "{": r"\{", "}": r"\}", "&": r"\&", "#": r"\#",
}  # fmt: skip
TOKEN = re.compile(
    r"(?P<sub>_(?:[A-Za-z]+|\d+[A-Za-z]?))|(?P<sup>\^\w+)|(?P<word>[A-Za-z]+)|(?P<hyphen>(?<=\w)-(?=\w))"
    r"|(?P<number>\d[\d,.]*\d|\d)|(?P<space>\s+)|(?P<other>\|\||\.\.|.)"
)
PACKAGES = r"% needs \usepackage{array,booktabs,longtable,lscape}"
# letters, whether the page is turned, and the characters that a line then has
LINES = ((r"\scriptsize", False, 84.0), (r"\scriptsize", True, 134.0), (r"\tiny", True, 158.0))
# characters that the space between two columns takes
GAP = 3.0
# lines of a table on a page
PAGE = 50
COLUMN = r">{\raggedright\hspace{0pt}\arraybackslash}p"
BLOCK = "block"


@dataclass(frozen=True)
class Table:
    """columns: headings with units. rows: a text per column; without one, there is no table, and the notes say why.
    notes: what a reader must know."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)

    def markdown(self) -> str:
        body = markdown(*([_code(cell) for cell in line] for line in (self.columns, *self.rows))) if self.rows else ""
        return f"## {_code(self.title)}\n\n{body}\n" + "".join(f"\n{_code(note)}\n" for note in self.notes)

    def latex(self) -> str:
        """As wide as the text at most: long cells wrap, wide tables are turned, long ones go on. Blocks head rows."""
        notes = [rf"\par\raggedright {tex(note)}" for note in self.notes]
        if not self.rows:
            return "\n".join([rf"\paragraph{{{tex(self.title)}}}", *notes, ""])
        first = self.columns[0] == BLOCK
        lines, block = [], None
        for row in self.rows:
            if first and row[0] != block:
                block = row[0]
                lines.append(rf"\addlinespace \multicolumn{{{len(row) - 1}}}{{@{{}}l}}{{\textit{{{tex(block)}}}}} \\")
            lines.append(" & ".join(map(tex, row[first:])) + r" \\")
        size, turned, widths, height = _fitted([row[first:] for row in (self.columns, *self.rows)])
        columns = "".join(rf"{COLUMN}{{\dimexpr {width:.3f}\linewidth-4pt\relax}}" for width in widths)
        caption = rf"\caption{{{tex(self.title)}}}"
        heads = [r"\toprule", " & ".join(map(tex, self.columns[first:])) + r" \\", r"\midrule"]
        if turned or height > PAGE:
            around = (r"\begin{landscape}", r"\end{landscape}") if turned else ("{", "}")
            opened = [rf"\begin{{longtable}}{{@{{}}{columns}@{{}}}}", rf"{caption} \\", *heads, r"\endhead"]
            closed = r"\end{longtable}"
        else:
            around = (r"\begin{table}", r"\end{table}")
            opened = [caption, rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}", *heads]
            closed = r"\end{tabular}"
        inside = [rf"{size}\setlength{{\tabcolsep}}{{2pt}}", *opened, *lines, r"\bottomrule", closed, *notes]
        return "\n".join([PACKAGES, around[0], *inside, around[1], ""])

    def write(self, path: Path) -> None:
        """path.md and path.tex; `path` has no suffix."""
        write_text(path.with_name(f"{path.name}.md"), self.markdown())
        write_text(path.with_name(f"{path.name}.tex"), self.latex())


def _code(text: str) -> str:
    return re.sub(r"\$([^$]*)\$", r"`\1`", text)


def tex(text: str) -> str:
    """Text for LaTeX: $formulas$ in math mode, `code` in typewriter, all else letter by letter."""
    found = []
    for part in re.split(r"(\$[^$]*\$|`[^`]*`)", text):
        if part.startswith("$") and len(part) > 1:
            found.append(f"${math(part[1:-1])}$")
        elif part.startswith("`") and len(part) > 1:
            found.append(rf"\texttt{{{_escaped(part[1:-1])}}}")
        else:
            found.append(_escaped(re.sub(r"(?<=[\w)]) x (?=\d)", " \N{MULTIPLICATION SIGN} ", part)))
    return "".join(found)


def _escaped(text: str) -> str:
    return "".join(ESCAPED.get(letter, letter) for letter in text)


def math(formula: str) -> str:
    """A formula in plain letters, such as `theta_D = G theta_d / sqrt(n)`, for LaTeX's math mode."""
    before, root, rest = formula.partition("sqrt(")
    if root:
        end = _closing(rest)
        return rf"{math(before)}\sqrt{{{math(rest[:end])}}}{math(rest[end + 1 :])}"
    found: list[str] = []
    for token in TOKEN.finditer(formula):
        text, kind = token.group(), token.lastgroup
        if kind == "sub" and text == "_hat":
            found[-1] = rf"\hat{{{found[-1]}}}"
        elif kind in ("sub", "sup"):
            inside = text[1:]
            found.append(
                text[0] + (rf"{{\mathrm{{{inside}}}}}" if inside.isalpha() and len(inside) > 2 else f"{{{inside}}}")
            )
        elif kind == "number":
            found.append(text.replace(",", "{,}"))
        elif kind == "space":
            # TeX breaks a line between factors only where it is told that it may
            found.append(r"\,\allowbreak " if found else " ")
        elif kind == "hyphen":
            found.append(r"\mbox{-}")
        elif text in _SYMBOLS:
            # a command ends where no letter follows
            found.append(f"{_SYMBOLS[text]} ")
        else:
            found.append(rf"\mathrm{{{text}}}" if kind == "word" and len(text) > 1 else text)
    return re.sub(r"\\,\\allowbreak (?=[=+\-/])|(?<=[=+\-/])\\,\\allowbreak ", " ", "".join(found))


def _closing(text: str) -> int:
    depth = 1
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return place
    return len(text)


def _fitted(lines: Sequence[Sequence[str]]) -> tuple[str, bool, list[float], float]:
    """The size of the letters, whether the page must be turned, each column's share of a line, and the count of lines.

    A column has room for its longest word, then by its longest cell.
    """
    words = [max(map(_word, column)) + GAP for column in zip(*lines, strict=True)]
    columns = [[_seen(cell) for cell in column] for column in zip(*lines, strict=True)]
    cells = [max(map(len, column)) + GAP for column in columns]
    size, turned, room = next((line for line in LINES if sum(words) <= line[2]), (*LINES[-1][:2], sum(words)))
    spare = (room - sum(words)) / max(1.0, sum(cells) - sum(words))
    wide = [word + min(spare, 1.0) * (cell - word) for word, cell in zip(words, cells, strict=True)]
    height = sum(
        max(ceil(len(cell) / (w - GAP)) for cell, w in zip(row, wide, strict=True))
        for row in zip(*columns, strict=True)
    )
    return size, turned, [each / room for each in wide], height


def _word(cell: str) -> int:
    """The longest part that is not broken: a root, a factor, a number; LaTeX hyphenates long words outside formulas."""
    if "$" in cell:
        whole = re.sub(r"sqrt\([^)]*\)", lambda root: root.group().replace(" ", ""), _seen(cell))
        return max(map(len, re.split(r"[ =]", whole)))
    parts = [word[:8] if word.isalpha() else word for word in re.split(r"[ =-]", cell)]
    return max(len(piece) for part in parts for piece in part.split("_"))


def _seen(cell: str) -> str:
    """As many characters as are printed."""
    return re.sub(r"theta|lambda|Lambda|Pi|[$`^_]", lambda found: "" if len(found.group()) < 2 else "t", cell)
