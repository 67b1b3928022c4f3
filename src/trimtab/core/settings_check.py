"""Finds mistakes in a run file from the source of the settings classes, before a stage and its libraries are loaded.

Importing a stage loads torch, which takes seconds, while a typo should be reported at once. The messages are those of
`config.resolve`, which checks everything again once the stage is loaded: only it can check several settings together
(`__post_init__`) and classes of the user's own.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from trimtab.core import config, registry
from trimtab.core.bounds import out_of_range
from trimtab.core.config import join
from trimtab.core.errors import ConfigError
from trimtab.core.foreign_keys import ours_for
from trimtab.core.settings_help import SettingsField, definition, keywords, registered, settings_class, settings_fields


def check(tables: Mapping[str, tuple[str, Mapping[str, Any]]], *, where: str) -> None:
    """Raises one ConfigError with the mistakes of all tables. `tables` maps each table's key path in the file ("" in a
    file of one stage) to the module of its stage and its values."""
    found = [m for path, (module, values) in tables.items() for m in mistakes(module, values, path)]
    if found:
        raise config.refused(found, where=where)


def mistakes(module: str, values: Any, path: str) -> list[str]:
    """The mistakes in the table of the stage that `module` defines."""
    return list(_table(_Class(module, settings_class(module)), values, path, defaults={}))


class _Class(NamedTuple):
    """A settings class, named by the module that defines it and its name."""

    module: str
    name: str


@functools.cache
def _fields(cls: _Class) -> dict[str, SettingsField]:
    home, node = definition(cls.module, cls.name)
    assert isinstance(node, ast.ClassDef), f"{cls.name} is no class"
    return settings_fields(home, node)


class _Meaning(NamedTuple):
    """What a field may hold: a settings class (`table`), registered classes by name (`kind`), or a `plain` type."""

    table: _Class | None = None
    kind: str = ""
    several: bool = False
    plain: Any = None
    optional: bool = False


def _table(cls: _Class, values: Any, path: str, *, defaults: Mapping[str, Any]) -> Iterator[str]:
    """The mistakes in a table. `defaults` holds the keys that the default of the table's own field already sets."""
    if not isinstance(values, Mapping):
        yield f"{path}: should be a table, not {values!r}"
        return
    fields = _fields(cls)
    for key in values:
        if key not in fields:
            siblings = [join(path, name) for name in fields]
            everything = list(_key_paths(cls, values, path))
            yield from config.unknown_keys(join(path, key), values[key], siblings, everything)
    for name, field in fields.items():
        if name in values:
            yield from _value(field, values[name], join(path, name))
        elif field.default is None and name not in defaults:
            yield config.missing(join(path, name))


def _value(field: SettingsField, value: Any, path: str) -> Iterator[str]:
    meaning = _meaning(field)
    if meaning.optional and (value is None or value == config.NONE):
        return
    if meaning.table is not None:
        yield from _table(meaning.table, value, path, defaults=keywords(field.default))
    elif meaning.kind and meaning.several:
        if not isinstance(value, Sequence) or isinstance(value, str):
            yield f"{path}: should be a list of names or tables, not {value!r}"
            return
        for number, one in enumerate(value):
            yield from _chosen(meaning.kind, one, join(path, str(number)), field=None)
    elif meaning.kind:
        yield from _chosen(meaning.kind, value, path, field=field)
    elif meaning.plain is not None:
        found: list[str] = []
        read = config.leaf(meaning.plain, value, path, found)
        yield from found
        if problem := out_of_range(path, read):
            yield f"{path}: {problem}"


def _chosen(kind: str, value: Any, path: str, *, field: SettingsField | None) -> Iterator[str]:
    if not isinstance(value, str | Mapping):
        yield f"{path}: should be a name or a table with a name, not {value!r}"
        return
    known = registered(kind)
    name = value if isinstance(value, str) else value.get("name", _default_name(field, known))
    if not isinstance(name, str):
        yield f"{path}: no name is given; known names: {', '.join(sorted(known))}"
    elif ":" in name:
        return  # a class of the user's own
    elif name not in known:
        error = registry.unknown_name(kind, name, known, where=path)
        yield f"{path}: {error.problem}; {error.fix}"
    else:
        values = {} if isinstance(value, str) else {k: v for k, v in value.items() if k != "name"}
        same = field is not None and name == _default_name(field, known)
        given = keywords(field.default) if field is not None and same else {}
        yield from _table(_Class(*known[name]), values, path, defaults=given)


def _default_name(field: SettingsField | None, known: Mapping[str, tuple[str, str]]) -> str | None:
    """The registered name of the class of the field's default, or None."""
    if field is None or not isinstance(field.default, ast.Call):
        return None
    made = ast.unparse(field.default.func)
    return next((name for name, (_, cls) in known.items() if cls == made), None)


def _meaning(field: SettingsField) -> _Meaning:
    """The meaning of a field's annotation. Names in it are followed to where they are defined."""
    annotation = ast.unparse(field.annotation)
    text = annotation.removesuffix(" | None")
    optional = text != annotation
    if text.startswith("Annotated[") and "Choice('" in text:
        kind = text.partition("Choice('")[2].partition("'")[0]
        return _Meaning(kind=kind, several=text.startswith("Annotated[tuple["), optional=optional)
    home, meant = definition(field.module, text)
    if isinstance(meant, ast.ClassDef):
        return _Meaning(table=_Class(home, meant.name), optional=optional)
    plain = {"Literal": Literal, "int": int, "float": float, "str": str, "bool": bool, "tuple": tuple, "dict": dict}
    try:
        # The annotation is this package's own source, and eval sees only the names of plain types.
        return _Meaning(
            plain=eval(ast.unparse(meant) if meant else text, {"__builtins__": {}}, plain), optional=optional
        )
    except NameError:
        return _Meaning(optional=optional)


def _key_paths(cls: _Class, values: Mapping[str, Any], path: str) -> Iterator[str]:
    """Every key path under `path` that these values could set. A choice contributes the fields of the class that the
    values name, or of its default's class."""
    for name, field in _fields(cls).items():
        full, meaning, value = join(path, name), _meaning(field), values.get(name, {})
        yield full
        inner = meaning.table
        if meaning.kind and not meaning.several and isinstance(value, str | Mapping):
            known = registered(meaning.kind)
            chosen = value if isinstance(value, str) else value.get("name", _default_name(field, known))
            inner = _Class(*known[chosen]) if isinstance(chosen, str) and chosen in known else None
        if inner is not None:
            yield from _key_paths(inner, value if isinstance(value, Mapping) else {}, full)


def nearest_stage(values: Mapping[str, Any], modules: Mapping[str, str]) -> list[str]:
    """The stages for which these values are a run file without mistakes."""
    return [stage for stage, module in modules.items() if not mistakes(module, values, "")]


def option_as_override(module: str, option: str, value: str | None) -> ConfigError:
    """The error for an option such as `--learning-rate 1e-4`. It says to write key=value, and names the key."""
    key = option.lstrip("-").replace("-", "_")
    cls = _Class(module, settings_class(module))
    paths = list(_key_paths(cls, {}, ""))
    paths.sort(key=lambda path: path.count("."))
    ours = next((path for path in paths if path.rpartition(".")[2] == key), "")
    said = "" if ours else config.unknown_key(key, list(_fields(cls)), paths).partition("; ")[2]
    if not ours and (meant := re.match(r"did you mean (\S+)\?", ours_for(key, paths))):
        ours = meant[1]
    given = value if value and not value.startswith("-") else "…"
    hint = (
        f"write {ours}={given}, without dashes" if ours else f"settings are written key=value, without dashes; {said}"
    )
    return ConfigError(f"no option {option}", where="the command line", fix=hint)
