"""The house as it stands: rooms, floors, arrows, circles, names and lines of a checkout, as JSON and as a picture.

    python benchmarks/rooms.py                                  this checkout: docs/evidence/data/house.json, "after"
    python benchmarks/rooms.py --checkout PATH --key before     another commit, such as one made with git worktree

A room is a folder or a file right under src/trimtab. An arrow is an import from one room in another, wherever in a file
it stands; a string that names a module counts too, but for the table of the registry. A floor is one above the highest
room that is imported. Lines of code are those without blank lines, comments and documentation.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import graphlib
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "evidence" / "data" / "house.json"
PICTURE = ROOT / "docs" / "evidence" / "house.svg"
LONG = 60
"""Lines that stand on a screen."""
MODULE = re.compile(r"trimtab(\.[a-z_]\w*)+")
TABLES = ("registry", "core.registry")
"""Where the table of modules stands, before and after."""


def files_of(checkout: Path) -> dict[str, Path]:
    """Dotted names of the modules, without `trimtab.`, and their files."""
    package = checkout / "src" / "trimtab"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name}


def reached(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Names of this package that a file imports, or names in a string (true)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", False) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            yield node.value, True


def measure(checkout: Path) -> dict[str, Any]:
    """The figures of a checkout."""
    files = files_of(checkout)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    rooms = {name.partition(".")[0] for name in files} - {"__main__"}
    arrows: dict[str, set[str]] = {room: set() for room in rooms}
    strings = 0
    for name, tree in trees.items():
        own = name.partition(".")[0]
        for full, is_string in reached(tree):
            room = full.removeprefix("trimtab.").partition(".")[0]
            if not full.startswith("trimtab.") or room not in rooms or own not in rooms or room == own:
                continue
            if is_string and name in TABLES:
                continue
            strings += is_string
            arrows[own].add(room)
    try:
        graphlib.TopologicalSorter(arrows).prepare()
        circle: list[str] = []
    except graphlib.CycleError as error:
        circle = list(error.args[1])

    @functools.cache
    def floor(room: str) -> int:
        return 1 + max((floor(below) for below in arrows[room]), default=0)

    classes: dict[str, set[str]] = collections.defaultdict(set)
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].add(name)
    lines = {room: {"code": 0, "all": 0, "comments": 0} for room in sorted(rooms)}
    for name, path in files.items():
        if (room := name.partition(".")[0]) in rooms:
            for key, number in lines_of(path.read_text(encoding="utf-8"), trees[name]).items():
                lines[room][key] += number
    return {
        "num_rooms": len(rooms),
        "num_arrows": sum(map(len, arrows.values())),
        "circle": circle,
        "strings_that_name_modules": strings,
        "floors": {} if circle else {room: floor(room) for room in sorted(rooms)},
        "arrows": {room: sorted(below) for room, below in sorted(arrows.items())},
        "names_of_several_classes": sorted(name for name, where in classes.items() if len(where) > 1),
        "long_functions": long_functions(trees),
        "lines": lines,
        "lines_in_all": {key: sum(room[key] for room in lines.values()) for key in ("code", "all", "comments")},
    }


def long_functions(trees: dict[str, ast.Module]) -> dict[str, int]:
    """The functions of more than a screen, `LONG` lines with signature and documentation, the longest first."""
    found = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return dict(sorted(((name, num) for name, num in found.items() if num > LONG), key=lambda item: -item[1]))


def lines_of(source: str, tree: ast.Module) -> dict[str, int]:
    """Lines with code, all lines, and comments."""
    documentation: set[int] = set()
    for node in ast.walk(tree):
        for inner in getattr(node, "body", []) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else []:
            value = inner.value if isinstance(inner, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                documentation |= set(range(inner.lineno, (inner.end_lineno or 0) + 1))
    code: set[int] = set()
    comments = 0
    spaces = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.type not in spaces:
            code |= set(range(token.start[0], token.end[0] + 1))
    return {"code": len(code - documentation), "all": len(source.splitlines()), "comments": comments}


def table(house: dict[str, Any]) -> str:
    """What differs before and after, in Markdown."""
    cells = {
        "rooms": lambda found: str(found["num_rooms"]),
        "arrows between them": lambda found: str(found["num_arrows"]),
        "rooms in a circle": lambda found: ", ".join(sorted(set(found["circle"]))) or "none",
        "strings that name a module, the registry's table aside": lambda found: str(found["strings_that_name_modules"]),
        "names of several classes": lambda found: str(len(found["names_of_several_classes"])),
        "lines of code": lambda found: f"{found['lines_in_all']['code']:,}",
        "comments": lambda found: f"{found['lines_in_all']['comments']:,}",
    }
    rows = [f"| {name} | {cell(house['before'])} | {cell(house['after'])} |" for name, cell in cells.items()]
    return "\n".join(["| | before | after |", "|---|---|---|", *rows])


def picture(house: dict[str, Any]) -> str:
    """The rooms on their floors, and an arrow for each import between them, as SVG."""
    floors: dict[int, list[str]] = collections.defaultdict(list)
    for room, floor in house["floors"].items():
        floors[floor].append(room)
    top, wide, high = max(floors), 130, 86
    places = {}
    for floor, rooms in floors.items():
        for i, room in enumerate(rooms):
            x = 60 + (i + 0.5) * (1000 / len(rooms))
            places[room] = (x, 40 + (top - floor) * high)
    parts = []
    for room, below in house["arrows"].items():
        for other in below:
            (x, y), (x2, y2) = places[room], places[other]
            parts.append(f'<line x1="{x:.0f}" y1="{y + 14:.0f}" x2="{x2:.0f}" y2="{y2 - 14:.0f}"/>')
    for room, (x, y) in places.items():
        code = house["lines"][room]["code"]
        parts.append(f'<rect x="{x - wide / 2:.0f}" y="{y - 14:.0f}" width="{wide}" height="28" rx="5"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 4:.0f}">{room} <tspan class="n">{code:,}</tspan></text>')
    style = (
        "line{stroke:#8aa;stroke-width:1;opacity:.55}rect{fill:#fff;stroke:#345}"
        "text{font:13px sans-serif;text-anchor:middle;fill:#123}.n{fill:#888;font-size:11px}"
    )
    size = f'viewBox="0 0 1120 {top * high + 20}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'


def main() -> None:
    """Measures a checkout, writes its figures beside the others, and draws it if it has floors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--key", choices=["before", "after"], default="after")
    options = parser.parse_args()
    known = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    known[options.key] = measure(options.checkout)
    OUT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.key == "after":
        PICTURE.write_text(picture(known["after"]), encoding="utf-8")
    shown = ("num_rooms", "num_arrows", "circle", "strings_that_name_modules", "lines_in_all")
    print(json.dumps({key: known[options.key][key] for key in shown}))
    print(f"{len(known[options.key]['names_of_several_classes'])} names of several classes")
    print(f"functions of more than {LONG} lines: {known[options.key]['long_functions']}")


if __name__ == "__main__":
    main()
