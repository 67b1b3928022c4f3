"""What the design asks of every file: imports point down, engines alone name devices, pages and words load no torch."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab

PACKAGE = Path(trimtab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULE = re.compile(r"trimtab(\.[a-z_]\w*)+")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

FLOORS = {
    **dict.fromkeys(["__main__"], 10),
    **dict.fromkeys(["cli"], 9),
    **dict.fromkeys(["ui"], 8),
    **dict.fromkeys(["stages", "feedback"], 7),
    **dict.fromkeys(["rewards", "environments", "reports"], 6),
    **dict.fromkeys(["engines", "sandbox"], 5),
    **dict.fromkeys(["models", "evals"], 4),
    **dict.fromkeys(["math", "data", "votes"], 3),
    **dict.fromkeys(["batches", "stats", "worlds", "runs"], 2),
    **dict.fromkeys(["core"], 1),
}
"""Each room imports from floors below its own, wherever in a file the import stands and however it is written."""
TABLE = "core.registry"
"""The one file that names modules above its own floor, as strings: what a run file names is found there."""
NO_TORCH = [
    "cli",
    "core",
    "stats",
    "votes",
    "runs",
    "evals",
    "worlds",
    "environments",
    "reports",
    "feedback",
    "sandbox",
    "ui",
]
NO_TORCH_MODULES = ["data.sources", "data.preferences", "data.split"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import, wherever in the file it stands; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each string that names a module of this package, as `import_module` takes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            yield node.lineno, node.value


def rooms_reached(path: Path, tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, room and name of whatever of this package a file imports or names."""
    strings = () if name_of(path) == TABLE else named(tree)
    for line, name in [*imported(tree), *strings]:
        top, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if top == "trimtab" and room in FLOORS:
            yield line, room, name


def test_imports_point_down():
    wrong = [
        f"{name_of(path)}:{line} reaches {name}"
        for path, tree in TREES.items()
        if (own := package_of(path)) != "__init__"
        for line, room, name in rooms_reached(path, tree)
        if room != own and FLOORS[room] >= FLOORS[own]
    ]
    assert not wrong, "\n".join(wrong)


def test_a_string_that_names_a_module_is_seen():
    tree = ast.parse('load("trimtab.feedback.source"); print("trimtab: a word")')
    assert [name for _, name in named(tree)] == ["trimtab.feedback.source"]


def test_no_files_import_each_other_in_a_circle():
    files = {f"trimtab.{name_of(path)}".removesuffix(".__init__"): path for path in FILES}

    def file_of(name: str) -> str:
        while name not in files:
            name = name.rpartition(".")[0]
        return name

    reached = {
        file: {file_of(name) for _, name in imported(TREES[path]) if name.partition(".")[0] == "trimtab"} - {file}
        for file, path in files.items()
    }
    graphlib.TopologicalSorter(reached).prepare()  # raises CycleError, which says which


def test_every_room_has_a_floor():
    assert {package_of(path) for path in FILES} - {"__init__", "examples"} == set(FLOORS)


def test_the_page_has_the_floors_as_they_are():
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", page, re.MULTILINE)
    shown = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    assert shown == {room: floor for room, floor in FLOORS.items() if room != "__main__"}


def device_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Places that choose where something is computed. Following a tensor (`device=x.device`) chooses nothing."""
    foreign = ("torch.distributed", "torch.cuda", "vllm", "ray", "deepspeed")
    for line, name in imported(tree):
        if any(name == f or name.startswith(f"{f}.") for f in foreign):
            yield line, f"imports {name}"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.split(":")[0] in ("cuda", "mps")
        ):
            yield node.lineno, f"the device {node.value!r}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.distributed"):
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            arguments = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "device")]
            if (
                node.func.attr == "cuda"
                or ast.unparse(node.func) == "torch.device"
                or (node.func.attr == "to" and any(map(_chosen_device, arguments)))
            ):
                yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Name | ast.arg) and (node.id if isinstance(node, ast.Name) else node.arg) in (
            "local_rank",
            "world_size",
        ):
            yield node.lineno, "a rank"


def _chosen_device(argument: ast.expr) -> bool:
    return (isinstance(argument, ast.Name) and argument.id == "device") or (
        isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    )


def test_only_engines_name_devices_and_ranks():
    # One more file moves tensors, for all: to a device that it is given.
    wrong = [
        f"{name_of(path)}:{line} {what}"
        for path, tree in TREES.items()
        if package_of(path) != "engines" and name_of(path) != "batches.device"
        for line, what in device_names(tree)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "import ray",
        "x.to(device)",
        "x.to('cuda')",
        "x.to(device='cuda:0')",
        "x.cuda()",
        "torch.device('cpu')",
        "torch.cuda.is_available()",
        "torch.zeros(3, device='cuda')",
        "def f(world_size): ...",
    ],
)
def test_the_search_for_devices_finds_them(code: str):
    assert list(device_names(ast.parse(code)))


@pytest.mark.parametrize("code", ["x.to(y.device)", "torch.zeros(3, device=x.device)", "import array", "x.to(y.dtype)"])
def test_the_search_for_devices_lets_followers_be(code: str):
    assert not list(device_names(ast.parse(code)))


def test_what_must_answer_at_once_never_loads_torch():
    in_rooms = [name_of(path) for path in FILES if package_of(path) in NO_TORCH]
    modules = [f"trimtab.{name.removesuffix('.__init__')}" for name in [*NO_TORCH_MODULES, *in_rooms]]
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    loaded = {{"torch", "transformers"}} & set(sys.modules)
    if loaded:
        sys.exit(f"{{module}} loads {{loaded}}")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Public functions and methods, `__init__` and its kind among them."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name.endswith("__")):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body)


def test_public_functions_are_annotated():
    wrong = []
    for path, tree in TREES.items():
        for function in functions(tree.body):
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or function.returns is None:
                wrong.append(f"{name_of(path)}:{function.lineno} {function.name}({', '.join(bare)})")
    assert not wrong, "\n".join(wrong)


def test_modules_and_their_public_names_have_docstrings():
    wrong = []
    for path, tree in TREES.items():
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{name_of(path)}: the module")
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if named and not ast.get_docstring(node):
                wrong.append(f"{name_of(path)}:{node.lineno} {node.name}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_longer_than_500_lines():
    root = PACKAGE.parents[1]
    files = [*FILES, *(root / "tests").rglob("*.py"), *(root / "benchmarks").glob("*.py")]
    sizes = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: size for name, size in sizes.items() if size > 500}


def type_names(tree: ast.Module) -> Iterator[str]:
    """The classes of a file, and the names it gives to types, such as `Split = Literal["train", "test"]`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[0].isupper() and any(letter.islower() for letter in name):
                yield name


def test_no_two_files_give_one_name_to_two_types():
    homes: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        for name in type_names(tree):
            homes.setdefault(name, set()).add(name_of(path))
    assert not {name: where for name, where in homes.items() if len(where) > 1}
