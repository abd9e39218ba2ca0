"""What goes to print beside the figures: LaTeX tables, and for each figure and table where its numbers come from."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pandas as pd

from pathfm.errors import InputError
from pathfm.figures import figures_dir
from pathfm.runs import notebooks_dir, provenance
from pathfm.storage import atomic, read_json, write_json

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "µ": r"\textmu{}",
    "−": "$-$",
    **{character: "\\" + character for character in "&%$#_{}"},
}
_PATTERN = re.compile("|".join(map(re.escape, _SPECIAL)))


def escape(text: str) -> str:
    """`text` as LaTeX prints it literally."""
    return _PATTERN.sub(lambda found: _SPECIAL[found.group()], text)


def latex(table: pd.DataFrame, caption: str, label: str, decimals: int = 2) -> str:
    """A booktabs table: numbers to the right with `decimals`, whole numbers without, missing ones as a dash.

    The index is not printed. Needs \\usepackage{booktabs}.
    """
    numbers = [pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool for name in table]
    lines = [" & ".join(escape(str(name)) for name in table)]
    lines += [" & ".join(_cell(value, decimals) for value in row) for row in table.itertuples(index=False)]
    head, *body = (f"{line} \\\\" for line in lines)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(caption)}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numbers)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _cell(value: Any, decimals: int) -> str:
    if pd.isna(value):
        return "--"
    if isinstance(value, float):
        return f"{value:.{decimals}f}".replace("-", "$-$")
    return escape(str(value))


def write(table: pd.DataFrame, name: str, caption: str, label: str, inputs: dict[str, Any] | None = None) -> Path:
    """<figures dir>/<name>.tex, its provenance in comments at the top and in <name>.json; returns the .tex."""
    path = figures_dir() / f"{name}.tex"
    body = latex(table, caption, label)
    facts = stamp(name, body.encode(), inputs)
    notes = "".join(f"% {key}: {facts[key]}\n" for key in ("made_by", "commit", "date", "device", "generator"))
    with atomic(path, "w") as file:
        file.write(notes + body)
    return path


def stamp(name: str, content: bytes | None = None, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Writes <figures dir>/<name>.json, where the figure or table `name` comes from, and returns what it says.

    content  whose hash stands in it; the figure's SVG where None
    inputs   what it was made of: parameters, runs, results

    A product that comes out as it was keeps the stamp of when it first did. Raises InputError where the figure
    is missing.
    """
    path = figures_dir() / f"{name}.json"
    if content is None:
        try:
            content = (figures_dir() / f"{name}.svg").read_bytes()
        except FileNotFoundError:
            raise InputError(f"there is no figure {name}.svg in {figures_dir()}; show it first") from None
    now = {
        "made_by": f"notebooks/{_notebook(name)}",
        "sha256": hashlib.sha256(content).hexdigest(),
        "inputs": inputs or {},
        **provenance(),
    }
    if path.exists():
        before = read_json(path)
        if all(before.get(key) == now[key] for key in ("sha256", "inputs", "generator")):
            return before
    write_json(path, now)
    return now


def _notebook(name: str) -> str:
    """The notebook that a figure's number points to: 07_scores -> 07_paper_figures.ipynb."""
    number = name.split("_")[0]
    return next((p.name for p in notebooks_dir().glob(f"{number}_*.ipynb")), f"{number}_*.ipynb")
