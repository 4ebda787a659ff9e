"""A table as Markdown and as LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.results import write_text

ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$", "|": "$|$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """name: of the files. columns: headings with units. rows: a text per column. notes: what a reader must know."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{body}\n" + "".join(f"\n{note}\n" for note in self.notes)

    def latex(self) -> str:
        body = "\n".join(" & ".join(map(escape, row)) + r" \\" for row in self.rows)
        notes = "".join(f"\n{escape(note)}\n" for note in self.notes)
        return (
            "\\begin{table}\n\\caption{" + escape(self.title) + "}\n\\begin{tabular}{" + "l" * len(self.columns) + "}\n"
            "\\toprule\n" + " & ".join(map(escape, self.columns)) + " \\\\\n\\midrule\n" + body + "\n\\bottomrule\n"
            "\\end{tabular}\n" + notes + "\\end{table}\n"
        )

    def write(self, out: Path) -> None:
        write_text(out / f"{self.name}.md", self.markdown())
        write_text(out / f"{self.name}.tex", self.latex())


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(ESCAPED.get(letter, letter) for letter in text)
