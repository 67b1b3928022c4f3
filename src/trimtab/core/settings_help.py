"""Help on settings, read from the source of their classes, because importing a stage would load torch."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import trimtab


class SettingsField(NamedTuple):
    """A field of a settings class, as written in its source."""

    module: str
    """The module that declares the field; names in its annotation are looked up there."""
    annotation: ast.expr
    default: ast.expr | None
    """The default as an expression, also one given by `field(...)`; None if there is none."""
    doc: str


def settings_help(
    module: str, class_name: str = "", prefix: str = "", defaults: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """A pair for each key of a settings class: a headline such as "learning_rate: float = 1e-5", and its documentation.

    Without `class_name` it is the settings class of the module's stage. `defaults` holds the defaults that the field
    with this class sets, if they differ from the class's own.
    """
    module, node = definition(module, class_name or settings_class(module))
    assert isinstance(node, ast.ClassDef), f"{class_name} is no class"
    # What the class adds comes before what it shares with others: its model and data before the trainer's options.
    own = [ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)]
    order = {name: place for place, name in enumerate(own)}
    fields = sorted(settings_fields(module, node).items(), key=lambda field: order.get(field[0], len(own)))
    for name, (declared_in, annotated, value, doc) in fields:
        annotation = ast.unparse(annotated)
        default = (defaults or {}).get(name) or (ast.unparse(value) if value else None)
        key, said = prefix + name, f" = {default}" if default else ", required"
        inner = keywords(value)
        if kind := re.search(r"Choice\('(\w+)'\)", annotation):
            choices = registered(kind[1])
            several = "several of: " if "tuple[" in annotation else "one of: "
            yield f"{key}{said}", f"{doc} By name, {several}{', '.join(choices)}."
            for choice, (home, of) in choices.items():
                given = inner if default and default.startswith(f"{of}(") else None
                yield from ((line, f"[{choice}] {text}") for line, text in settings_help(home, of, f"{key}.", given))
            continue
        home, meaning = definition(declared_in, annotation.removesuffix(" | None"))
        if isinstance(meaning, ast.ClassDef):
            yield f"{key}: table{' = None' if default == 'None' else ''}", doc
            yield from settings_help(home, meaning.name, f"{key}.", inner)
        else:  # a built-in type, or a name for one such as Schedule = Literal["constant", "linear"]
            yield f"{key}: {ast.unparse(meaning) if meaning else annotation}{said}", doc


def settings_class(module: str) -> str:
    """The name of the settings class in the module's `STAGE = Stage(settings=…)`."""
    for node in _parsed(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STAGE":
            return keywords(node.value)["settings"]
    raise AssertionError(f"{module} holds no stage")


def summary_of(module: str) -> str:
    """The first paragraph of a module's docstring, on one line. For a stage it is its line of help."""
    return (ast.get_docstring(_parsed(module)) or "").partition("\n\n")[0].replace("\n", " ")


@functools.cache
def registered(kind: str) -> dict[str, tuple[str, str]]:
    """Maps each name that `registry.names` would give to its module and class, without importing any."""
    pattern = re.compile(rf"""^@(?:registry\.)?register\("{kind}", "([^"]+)"\)\n(?:@.*\n)*class (\w+)""", re.MULTILINE)
    package = Path(trimtab.__file__).parent
    return {
        name: (".".join(path.relative_to(package.parent).with_suffix("").parts), class_name)
        for path in sorted(package.rglob("*.py"))
        for name, class_name in pattern.findall(path.read_text(encoding="utf-8"))
    }


def settings_fields(module: str, node: ast.ClassDef) -> dict[str, SettingsField]:
    """The fields of a settings class that a run file may set, those of its bases first."""
    found: dict[str, SettingsField] = {}
    for name in map(ast.unparse, node.bases):
        home, base = definition(module, name)
        if isinstance(base, ast.ClassDef):
            found |= settings_fields(home, base)
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        name = ast.unparse(field.target)
        if "ClassVar" in ast.unparse(field.annotation):
            found.pop(name, None)  # a ClassVar fixes a setting of the base, which a run file can then no longer set
        else:
            found[name] = SettingsField(module, field.annotation, _default(field), _docstring(after))
    return found


def definition(module: str, name: str) -> tuple[str, ast.ClassDef | ast.expr | None]:
    """The module and the node that define a name, following imports; the node is None if it is not this package's."""
    for node in _parsed(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            home = node.module or ""
            return definition(home, name) if home.startswith("trimtab.") else (module, None)
    return module, None


@functools.cache
def _parsed(module: str) -> ast.Module:
    return ast.parse(_source_of(module).read_text(encoding="utf-8"))


def _source_of(module: str) -> Path:
    path = Path(trimtab.__file__).parent.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _default(field: ast.AnnAssign) -> ast.expr | None:
    """The default as an expression, also one given by `field(...)`."""
    value = field.value
    if not isinstance(value, ast.Call) or ast.unparse(value.func) not in ("field", "dataclasses.field"):
        return value
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    if "default" in given:
        return given["default"]
    factory = given["default_factory"]
    return factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])


def keywords(value: ast.expr | None) -> dict[str, str]:
    """The keywords of a call such as `AdamW(learning_rate=1e-5)`, as source text."""
    given = value.keywords if isinstance(value, ast.Call) else []
    return {keyword.arg: ast.unparse(keyword.value) for keyword in given if keyword.arg}
