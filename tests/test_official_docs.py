"""docs/official.md has every section and row that the code cites, and its options are those of the configs."""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs import default, lpr750k, rice

ROOT = Path(__file__).parent.parent
FOLDERS = ("rice_jax", "data_pipeline", "configs", "tests", "benchmarks", "docs", "launch")
TEXT = (ROOT / "docs" / "official.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^#{2,3} (\d+(?:\.\d+)?) \S", TEXT, re.MULTILINE)
TABLE = TEXT[TEXT.index("\n## 11 ") : TEXT.index("\n## 12 ")]
CELLS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines() if re.match(r"\| \d", line)]
ROWS = {int(cells[0]) for cells in CELLS}

NUMBER, NEXT = r"\d+(?:\.\d+)*", r"(?:-|,? and |,? to |, )"
LIST = rf"{NUMBER}(?:{NEXT}{NUMBER})*"
CITATION = re.compile(rf"docs/official\.md (?P<sections>{LIST})(?:,? rows? (?P<rows>{LIST}))?")
BRACKETS = re.compile(r"\S \[(\d+(?:, \d+)*)\]")
# Documents that no reader of this repository has.
PRIVATE = re.compile(r"\bSPEC\b|\bDESIGN\b|\bSTYLE(?:\.md)?,? \d")


def texts() -> Iterator[tuple[Path, str]]:
    """Every Python file and document of the repository, except docs/official.md, with its text."""
    files = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))]
    for path in sorted(files):
        if path.suffix in (".py", ".md") and path != ROOT / "docs" / "official.md":
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def numbers(found: str | None) -> list[str]:
    return re.findall(NUMBER, found or "")


def test_sections_and_rows_stand_in_order() -> None:
    order = [tuple(map(int, number.split("."))) for number in SECTIONS]
    assert order == sorted(set(order))
    assert [number for number in order if len(number) == 1] == [(section,) for section in range(1, 16)]
    assert list(dict.fromkeys(int(cells[0]) for cells in CELLS)) == list(range(1, 40))


def test_every_citation_names_a_section_or_a_row_that_exists() -> None:
    cited = 0
    for path, text in texts():
        flat = re.sub(r"\s*\n[\s#]*", " ", text)  # a citation may be broken by the end of a line
        for citation in CITATION.finditer(flat):
            cited += 1
            sections, rows = numbers(citation["sections"]), numbers(citation["rows"])
            assert set(sections) <= set(SECTIONS), f"{path}: {citation[0]}"
            assert set(map(int, rows)) <= ROWS and (not rows or "11" in sections), f"{path}: {citation[0]}"
    assert cited > 50


def test_the_golden_figures_name_sections_that_exist() -> None:
    text = (ROOT / "tests" / "golden" / "README.md").read_text(encoding="utf-8")
    cited = re.findall(r"\((\d+\.\d+)\)", text)
    assert cited and set(cited) <= set(SECTIONS)


def test_every_row_that_a_config_names_in_brackets_exists() -> None:
    cited = set()
    for path, text in texts():
        if path.parts[0] == "configs":
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            text = "\n".join(t.string for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING))
        elif path != Path("docs/config.md"):
            continue
        cited |= {int(row) for rows in BRACKETS.findall(text) for row in numbers(rows)}
    assert cited and cited <= ROWS


def test_nothing_cites_a_document_that_is_not_here() -> None:
    for path, text in texts():
        for number, line in enumerate(text.splitlines(), 1):
            assert not PRIVATE.search(line), f"{path}:{number}: {line}"


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def value(config: Any, field: str) -> Any:
    return functools.reduce(getattr, field.split("."), config)


@pytest.mark.parametrize("cells", CELLS, ids=lambda cells: f"row {cells[0]}")
def test_a_row_gives_the_official_value_and_ours(cells: list[str]) -> None:
    assert len(cells) == 6 and all(cells[:4])
    option, official, otherwise = cells[3:]
    for field in code(option):
        if re.fullmatch(r"(data|model|loss|optimizer)\.\w+", field):
            value(default.get_config(), field)  # raises where there is no such field
    if not code(official):
        return
    field = code(option)[0]
    values = set(map(ast.literal_eval, code(official)))
    assert {value(lpr750k.get_config(stage), field) for stage in default.STAGES} == values
    ours = [ast.literal_eval(text) for text in code("".join(re.findall(r"\*\*.+?\*\*", otherwise)))]
    assert {value(rice.get_config(stage), field) for stage in default.STAGES} == (set(ours) or values)
