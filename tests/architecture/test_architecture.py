"""What the design asks of every file: imports point down, engines alone name devices, pages and words load no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab

PACKAGE = Path(trimtab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

LAYERS = {
    **dict.fromkeys(["__main__"], 8),
    **dict.fromkeys(["cli"], 7),
    **dict.fromkeys(["stages"], 6),
    **dict.fromkeys(["engines", "rewards"], 5),
    **dict.fromkeys(["models", "protocols", "environments", "feedback"], 4),
    **dict.fromkeys(["data", "math", "worlds", "reports"], 3),
    **dict.fromkeys(["runs", "config", "settings_help", "settings_check", "hub"], 2),
    **dict.fromkeys(["types", "metrics", "registry", "errors", "evals", "seeds"], 1),
    **dict.fromkeys(["bounds", "files", "foreign_keys"], 1),
}
SIDEWAYS = {
    ("data", "worlds"),  # "world:helpdesk" is a source
    ("runs", "config"),  # settings.toml is written and compared
    ("settings_check", "config"),  # says mistakes in its words
    ("settings_check", "settings_help"),  # reads the same source
    ("files", "errors"),
    ("registry", "errors"),
    ("evals", "types"),  # statistics of pairs and replies
}
NO_TORCH = [
    "cli",
    "config",
    "settings_help",
    "settings_check",
    "bounds",
    "files",
    "foreign_keys",
    "registry",
    "types",
    "metrics",
    "errors",
    "seeds",
]
NO_TORCH_PACKAGES = ["runs", "evals", "worlds", "environments", "reports", "feedback"]
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


def test_imports_point_down():
    wrong = []
    for path, tree in TREES.items():
        source = package_of(path)
        if source == "__init__":
            continue
        for line, name in imported(tree):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top != "trimtab" or target not in LAYERS or target == source or (source, target) in SIDEWAYS:
                continue
            if LAYERS[target] >= LAYERS[source]:
                wrong.append(f"{name_of(path)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_layer():
    assert {package_of(path) for path in FILES} - {"__init__", "examples"} <= set(LAYERS)


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
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.distributed", "torch.device"):
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            arguments = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "device")]
            if node.func.attr == "cuda" or (node.func.attr == "to" and any(map(_chosen_device, arguments))):
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
    wrong = [
        f"{name_of(path)}:{line} {what}"
        for path, tree in TREES.items()
        if package_of(path) != "engines"
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
    in_packages = [name_of(path) for path in FILES if package_of(path) in NO_TORCH_PACKAGES]
    modules = [f"trimtab.{name.removesuffix('.__init__')}" for name in [*NO_TORCH, *NO_TORCH_MODULES, *in_packages]]
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
    long = {name_of(p): n for p in FILES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long
