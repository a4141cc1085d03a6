"""The table of cells in docs/operators.md: `python -m tests.conformance.table` writes it."""

import importlib
import re
from pathlib import Path

from .cases import CASES, Case
from .cells import CELLS, Cell, refusal

__all__ = ["CELLS", "DOCUMENT", "written"]

for _uses in ("eager", "fresh", "derivatives", "modules", "processes"):  # each fills CELLS, in this order
    importlib.import_module(f"tests.conformance.cells_{_uses}")

DOCUMENT = Path(__file__).parents[2] / "docs" / "operators.md"
_TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of the table -->)", re.DOTALL)


def written(document: str) -> str:
    """The document with the table as the cases and cells make it."""
    return _TABLE.sub(lambda _: _table(), document)


def _table() -> str:
    lines = ["| Use | What is compared | Right | Refused |", "| --- | --- | --- | --- |"]
    for cell in CELLS.values():
        description = " ".join((cell.check.__doc__ or "").split())
        lines.append(f"| {cell.name} | {description} | {_right(cell)} | {_refused(cell)} |")
    return "\n".join(lines) + "\n"


def _right(cell: Cell) -> str:
    possible = [case for case in CASES if cell.applies(case)]
    right = [case for case in possible if refusal(case, cell) is None]
    if not right:
        return "none"
    if len(right) < len(possible):
        return _names(right)
    return f"all {len(possible)} {cell.applies.__doc__}".strip()


def _refused(cell: Cell) -> str:
    of_sentence: dict[str, list[Case]] = {}
    for case in CASES:
        sentence = refusal(case, cell)
        if sentence is not None and cell.applies(case):
            of_sentence.setdefault(sentence, []).append(case)
    return "; ".join(f"{_names(cases)}: “{sentence}”" for sentence, cases in of_sentence.items())


def _names(cases: list[Case]) -> str:
    """The ops and modules, each once with what its cases are of."""
    of_name: dict[str, list[str]] = {}
    for case in cases:
        name, _, what = case.name.partition(", ")
        of_name.setdefault(name, []).append(what)
    every: dict[str, int] = {}
    for case in CASES:
        every[case.name.partition(", ")[0]] = every.get(case.name.partition(", ")[0], 0) + 1
    return ", ".join(
        f"`{name}`" + ("" if len(kinds) == every[name] else f" ({', '.join(kind or 'plain' for kind in kinds)})")
        for name, kinds in of_name.items()
    )


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
