"""The tables of README.md and docs/RESULTS.md, out of the JSON files that the other commands wrote.

A table stands where a comment names its file, whole or some of its rows:

    <!-- benchmarks/train.json: as configured; plain kernels -->
    <!-- end -->
"""

import argparse
import json
import re
from pathlib import Path

from configs.files import atomic_write

PAGES = ("README.md", "docs/RESULTS.md")
BEGIN = "<!-- benchmarks/"
TABLE = re.compile(
    rf"<!-- (benchmarks/\w+\.json)(?:: ([^\n]*?))? -->\n(?:(?!{BEGIN}).)*?<!-- end -->", re.DOTALL
)


def section(file: str, names: str | None) -> str:
    """What, where, how to measure it again, and the table, as Markdown. names: of rows, with ; in
    between. ValueError: there is no such row."""
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    heading, *rows = found["table"]
    if names is not None:
        wanted = [name.strip() for name in names.split(";")]
        if unknown := {*wanted} - {row[0] for row in rows}:
            raise ValueError(f"{file}: no row is named {min(unknown)!r}")
        rows = [row for row in rows if row[0] in wanted]
    rule = ["---", *["---:"] * (len(heading) - 1)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heading, rule, *rows)]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = f"{found['device']}, {versions}, commit {found['commit']}, `{file}`:"
    return "\n".join([where, "", f"    {found['command']}", "", *lines])


def with_tables(page: str) -> str:
    """The page with every table as its file has it. ValueError: one has lost an end of its own."""
    whole, begun = len(TABLE.findall(page)), page.count(BEGIN)
    if whole < begun:
        marks = '"<!-- benchmarks/NAME.json -->" above it, "<!-- end -->" below'
        raise ValueError(f"{whole} of {begun} tables are whole: {marks}")

    def fill(found: re.Match) -> str:
        begin = found[0].partition("\n")[0]
        return "\n\n".join([begin, section(found[1], found[2]), "<!-- end -->"])

    return TABLE.sub(fill, page)


def bench_readme(parsed: argparse.Namespace) -> None:
    for name in PAGES:
        page = Path(name).read_text(encoding="utf-8")
        made = with_tables(page)
        with atomic_write(Path(name)) as file:
            file.write(made)
        print(f"{name}: {len(TABLE.findall(made))} tables of benchmarks/")


def add_readme_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_readme)
