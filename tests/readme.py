"""The table of flags in the README, made from the parser.

python tests/readme.py        writes it there
"""

import argparse
from pathlib import Path

from hrm_esp.cli import build_parser

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- flags: made by tests/readme.py -->\n", "<!-- end of flags -->\n"


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    return choices


def flag(action: argparse.Action) -> str:
    """As it is written: ``--size tiny|small|base``."""
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.choices:
        return f"`{name} {'|'.join(map(str, action.choices))}`".replace("|", "\\|")
    value = action.metavar or action.dest.upper()
    return f"`{name}`" if action.nargs == 0 or not action.option_strings else f"`{name} {value}`"


def table() -> str:
    """A row for each flag, with the commands that have it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, parser in commands().items():
        for action in parser._actions:
            if action.dest != "help":
                text = (action.help or "").replace("|", "\\|")
                rows.setdefault((flag(action), text), []).append(name)
    lines = [f"| {name} | {', '.join(of)} | {text} |\n" for (name, text), of in rows.items()]
    return "".join(["| flag | of | what it does |\n| --- | --- | --- |\n", *lines])


def with_table(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table() + "\n" + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
