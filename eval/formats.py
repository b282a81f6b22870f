"""One grid of text as Markdown, as LaTeX (booktabs) and for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass, field

Line = list[str] | str  # the cells of a row, or a heading that stands over the rows after it

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "†": r"$\dagger$",
    "λ": r"$\lambda$",
    "×": r"$\times$",
    "−": r"$-$",
    "·": r"$\cdot$",
    "–": "--",
    "…": r"\ldots{}",
    "“": "``",
    "”": "''",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "≥": r"$\geq$",
    "*": r"$^{*}$",
    "|": r"\textbar{}",
}


@dataclass
class Grid:
    """A table: the first column is text, the others are figures; ``caption`` is one line without markup."""

    header: list[str]
    lines: list[Line] = field(default_factory=list)
    caption: str = ""


def markdown(grid: Grid) -> list[str]:
    """GitHub's pipe table, line by line; headings are rows in bold with empty cells."""
    width = len(grid.header)
    lines = [
        "| " + " | ".join(map(_pipe, grid.header)) + " |",
        "|" + "|".join(["---"] + ["--:"] * (width - 1)) + "|",
    ]
    for line in grid.lines:
        cells = [f"**{line}**"] + [""] * (width - 1) if isinstance(line, str) else line
        lines.append("| " + " | ".join(map(_pipe, cells)) + " |")
    return lines


def _pipe(text: str) -> str:
    return text.replace("|", "\\|")


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex(grid: Grid) -> str:
    """A ``table`` with booktabs' rules; it needs ``\\usepackage{booktabs}``."""
    width = len(grid.header)

    def row(cells: Sequence[str]) -> str:
        return " & ".join(map(escape, cells)) + r" \\"

    lines = [
        r"\begin{table}",
        r"\centering",
        r"\footnotesize",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
    ]
    lines += [row(grid.header), r"\midrule"]
    for number, line in enumerate(grid.lines):
        if isinstance(line, str):
            lines += [r"\midrule"] * (number > 0) + [
                rf"\multicolumn{{{width}}}{{l}}{{\textit{{{escape(line)}}}}} \\"
            ]
        else:
            lines.append(row(line))
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\caption{{{escape(grid.caption)}}}"] * bool(grid.caption)
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns for a terminal: the first two to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    return [
        "  ".join(
            text.ljust(n) if i < 2 else text.rjust(n) for i, (text, n) in enumerate(zip(line, widths))
        ).rstrip()
        for line in [header, *lines]
    ]
