"""The README's performance section, out of the JSON files that the other commands wrote."""

import argparse
import json
from pathlib import Path

from configs.files import atomic_write

BEGIN = "<!-- written by `python -m scripts.bench readme`, from benchmarks/*.json -->"
END = "<!-- end of the benchmarks -->"


def section(file: Path) -> str:
    """What, where, how to measure it again, and the table, as Markdown."""
    found = json.loads(file.read_text())
    heading, *rows = found["table"]
    rule = ["---", *["---:"] * (len(heading) - 1)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heading, rule, *rows)]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = f"{found['device']}, {versions}, commit {found['commit']}, `{file.as_posix()}`:"
    return "\n".join([where, "", f"    {found['command']}", "", *lines])


def with_benchmarks(readme: str, files: list[Path]) -> str:
    """The README with its section replaced. ValueError: it has no such section."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f'README.md: no "{BEGIN}" followed by "{END}"; put them back')
    return "\n\n".join([before + BEGIN, *map(section, files), END + after])


def bench_readme(parsed: argparse.Namespace) -> None:
    files = sorted(Path("benchmarks").glob("*.json"))
    path = Path("README.md")
    text = with_benchmarks(path.read_text(encoding="utf-8"), files)
    with atomic_write(path) as file:
        file.write(text)
    print(f"{path}: {len(files)} tables of benchmarks/")


def add_readme_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_readme)
