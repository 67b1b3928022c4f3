"""Converts run files (TOML and `key=value` overrides) to settings dataclasses and back.

All mistakes of a file are reported in one message.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from trimtab.core import registry
from trimtab.core.bounds import out_of_range
from trimtab.core.errors import ConfigError
from trimtab.core.foreign_keys import ours_for

T = TypeVar("T")

_STEP = r'(?:"[^"]+"|[^."]+)'
"""One key in the path of an override, quoted or not."""
NONE = "none"
"""What a run file writes for None, since TOML has no null value. Only fields declared `X | None` accept it."""


@dataclass(frozen=True)
class Choice:
    """Marks a field whose value is one of the classes registered under `kind`.

    `Annotated[Any, Choice("policy_loss")]` takes a name, or a table with a `name` and that class's own fields;
    `Annotated[tuple[Any, ...], Choice("reward")]` takes a list of them. A table without a name means the class of the
    field's default. When the class is that of the default, keys that the table leaves out keep the default's values.
    """

    kind: str


def load_run_file(path: str | Path) -> dict[str, Any]:
    """The tables of a run file. Raises ConfigError if there is no such file or it is not TOML."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no run file {str(path)!r}", where="the command line", fix=_near_files(path))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"not TOML: {error}", where=str(path), fix="save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise not_toml(error, path) from error


def not_toml(error: tomllib.TOMLDecodeError, path: Path) -> ConfigError:
    """The error for a file that is not TOML. It quotes the line and suggests what was probably meant."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    place = re.search(r"line (\d+)", str(error))
    at_end = "end of document" in str(error) and lines
    number = int(place[1]) if place else len(lines) if at_end else 0
    line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    quoted = f"\n  line {number}: {line}" if line else ""
    return ConfigError(f"not TOML: {error}{quoted}", where=str(path), fix=_toml_hint(line, path))


def _toml_hint(line: str, path: Path) -> str:
    """What to write instead of the line."""
    key, equals, value = (part.strip() for part in line.partition("="))
    if path.suffix in (".yaml", ".yml", ".json") or (not equals and re.match(r"[\w.-]+:(\s|$)", line)):
        return "run files are TOML: write key = value, and [table] on a line of its own (https://toml.io)"
    word = value.partition("#")[0].strip().rstrip(",")
    if word in ("True", "False"):
        return f"write {key} = {word.lower()}"
    if word in ("None", "null", "nil"):
        return f'write {key} = "none", or leave the key out'
    if equals and re.fullmatch(r"[^\W\d][^\"'\[\]{}]*|[./~][^\"'\[\]{}]*", word):
        return f'put the text in quotes: {key} = "{word}"'
    return "correct that line (https://toml.io)"


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=3` set. The right side is read as a TOML value if it is one, else as text.

    `rewards.0.weight=2` sets a key of a list's first table, `rewards.1={name="length"}` adds to a list of one, and
    `loss.clip_high=0.3` turns `loss = "ppo"` into a table. A key that holds a dot is quoted: `stages."v1.0".seed=1`.
    Raises ConfigError naming every override that cannot be applied.
    """
    result = copy.deepcopy(dict(values))
    mistakes = []
    for override in overrides:
        key, equals, text = override.partition("=")
        steps = [step.strip('"') for step in re.findall(_STEP, key.strip())]
        if not equals or not re.fullmatch(rf"{_STEP}(?:\.{_STEP})*", key.strip()):
            mistakes.append(f"{override!r} is not of the form key=value")
        elif problem := set_value(result, steps, _parsed(text.strip())):
            mistakes.append(f"{override!r}: {problem}")
    if mistakes:
        raise ConfigError(_listed(mistakes), where="the command line", fix="write overrides as table.key=value")
    return result


def resolve(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """The settings that `values` describe, with defaults filled in.

    A table that sets only some keys keeps the other values of its field's default: with a default of
    AdamW(learning_rate=3e-6), `optimizer.schedule = "linear"` does not change the learning rate.

    Raises one ConfigError that lists every mistake by its full key path: unknown keys with the nearest known one,
    wrong types, missing keys, unknown registry names, and values that a `__post_init__` refused with ValueError.
    """
    return typing.cast(T, resolve_tables({"": cls}, {"": values}, where=where)[""])


def resolve_tables(
    classes: Mapping[str, type], values: Mapping[str, Mapping[str, Any]], *, where: str
) -> dict[str, Any]:
    """The settings of several tables at once, keyed by the key path that each has in its file (`stages.sft`).

    Raises one ConfigError with the mistakes of all tables.
    """
    mistakes: list[str] = []
    resolved = {path: _table(cls, values[path], None, path, mistakes) for path, cls in classes.items()}
    if mistakes:
        raise refused(mistakes, where=where)
    return resolved


def refused(mistakes: list[str], *, where: str) -> ConfigError:
    """The one error for all mistakes of a run file, or of options."""
    place = "on the command line" if where == "the command line" else "in the run file or its overrides"
    return ConfigError(_listed(mistakes), where=where, fix=f"correct these {place}")


def dump(settings: Any) -> dict[str, Any]:
    """The settings as TOML values: `resolve(type(settings), dump(settings))` gives equal settings back.

    Settings made in Python are checked here as strictly as a run file, and raise the same ConfigError.
    """
    values = _dumped_table(settings, None)
    resolve(type(settings), values, where=f"{type(settings).__module__}.{type(settings).__qualname__}")
    return values


def to_toml(values: Mapping[str, Any]) -> str:
    """`values` as a TOML document; None values are left out."""
    return "\n".join(_toml_lines(values, ())).strip() + "\n"


# --- from values to settings. `None` stands for a value already reported in `mistakes`. ---


def _table(cls: type, values: Any, default: Any, path: str, mistakes: list[str]) -> Any:
    if not isinstance(values, Mapping):
        mistakes.append(f"{path}: should be a table, not {values!r}")
        return None
    before = len(mistakes)
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {field.name: field for field in _fields(cls)}
    for key in values:
        if key not in known:
            siblings = [join(path, name) for name in known]
            mistakes += unknown_keys(join(path, key), values[key], siblings, list(_key_paths(cls, values, path)))
    arguments = {}
    ours = cls.__module__.startswith("trimtab.")  # ranges go by name, and a user's class may use a name differently
    for name, field in known.items():
        standing, full = _default(field, default), join(path, name)
        if name in values:
            arguments[name] = _value(hints[name], values[name], standing, full, mistakes)
            if ours and (problem := out_of_range(full, arguments[name])):
                mistakes.append(f"{full}: {problem}")
        elif standing is MISSING:
            mistakes.append(missing(full))
        else:
            arguments[name] = standing
    if len(mistakes) > before:
        return None
    try:
        return cls(**arguments)
    except ValueError as error:
        mistakes.append(f"{path}: {error}" if path else str(error))
        return None


def _value(hint: Any, value: Any, default: Any, path: str, mistakes: list[str]) -> Any:
    inner = _without_none(hint)
    if inner is not hint:
        if value is None or value == NONE:
            return None
        hint = inner
    if choice := _choice(hint):
        if not _is_tuple(hint):
            return _chosen(choice.kind, value, default, path, mistakes)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_chosen(choice.kind, v, MISSING, join(path, str(i)), mistakes) for i, v in enumerate(value))
        mistakes.append(f"{path}: should be a list of names or tables, not {value!r}")
        return None
    if dataclasses.is_dataclass(hint):
        return _table(typing.cast(type, hint), value, default, path, mistakes)
    return leaf(hint, value, path, mistakes)


def leaf(hint: Any, value: Any, path: str, mistakes: list[str]) -> Any:
    """The value as a plain type such as int or Path. If the type is wrong, adds a mistake and returns None.

    As strict as JSON: "3" and 1.5 are not integers; 3 is accepted as a float, a list as a tuple, a string as a path.
    """
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value, default=os.fspath), strict=True)
    except TypeError:
        mistakes.append(f"{path}: {value} is a date or time; put it in quotes")
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input ") for e in error.errors()))
        meant = f"; write {value.lower()}" if hint is bool and value in ("True", "False") else ""
        mistakes.append(f"{path}: {wanted}, not {value!r}{meant}")
    return None


def _chosen(kind: str, value: Any, default: Any, path: str, mistakes: list[str]) -> Any:
    if not isinstance(value, str | Mapping):
        mistakes.append(f"{path}: should be a name or a table with a name, not {value!r}")
        return None
    try:
        cls = _class_of(kind, value, default, path)
    except ConfigError as error:
        mistakes.append(f"{path}: {error.problem}; {error.fix}")
        return None
    fields = {} if isinstance(value, str) else {k: v for k, v in value.items() if k != "name"}
    return _table(cls, fields, default if type(default) is cls else None, path, mistakes)


def _class_of(kind: str, value: str | Mapping[str, Any], default: Any, path: str) -> type:
    name = value if isinstance(value, str) else value.get("name")
    if name is None and default not in (MISSING, None):
        return type(default)
    if not isinstance(name, str):
        raise ConfigError("no name is given", where=path, fix=f"known names: {', '.join(registry.names(kind))}")
    return registry.find(kind, name, where=path)


# --- the fields of a settings class ---


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field[Any], holder: Any) -> Any:
    """The field's value if the file does not set it: that of `holder`, the default instance, if given, else its own."""
    if dataclasses.is_dataclass(holder):
        return getattr(holder, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _without_none(hint: Any) -> Any:
    """X for `X | None`; any other hint unchanged."""
    if get_origin(hint) not in (Union, types.UnionType) or type(None) not in get_args(hint):
        return hint
    return Union[tuple(a for a in get_args(hint) if a is not type(None))]  # noqa: UP007


def _choice(hint: Any) -> Choice | None:
    if get_origin(hint) is not Annotated:
        return None
    return next((extra for extra in get_args(hint)[1:] if isinstance(extra, Choice)), None)


def _is_tuple(hint: Any) -> bool:
    return get_origin(get_args(hint)[0]) is tuple


# --- from settings to values ---


def _dumped_table(settings: Any, default: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(type(settings), include_extras=True)
    result = {}
    for field in _fields(type(settings)):
        value, standing = getattr(settings, field.name), _default(field, default)
        if value is not None:
            result[field.name] = _dumped(hints[field.name], value, standing)
        elif standing is not None:
            result[field.name] = NONE
    return result


def _dumped(hint: Any, value: Any, default: Any) -> Any:
    hint = _without_none(hint)
    base = default if type(default) is type(value) else None
    if choice := _choice(hint):
        if _is_tuple(hint):
            return [{"name": registry.name_of(choice.kind, type(v)), **_dumped_table(v, None)} for v in value]
        return {"name": registry.name_of(choice.kind, type(value)), **_dumped_table(value, base)}
    if dataclasses.is_dataclass(value):
        return _dumped_table(value, base)
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


# --- overrides ---


def _parsed(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    return text if isinstance(value, datetime.date | datetime.time) else value


def set_value(values: dict[str, Any], steps: Sequence[str], value: Any) -> str:
    """Sets the value at a path of keys in place; in a list, the key after its last one adds to it. Returns a message if
    that is impossible, else ''."""
    here: Any = values
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(here, list):
            if last and step == str(len(here)):
                here.append(value)
                return ""
            if not step.isdigit() or int(step) >= len(here):
                return f"{'.'.join(steps[:depth])} is a list of {len(here)}, its keys are 0 to {len(here) - 1}"
            key: Any = int(step)
        elif isinstance(here, dict):
            key = step
            here.setdefault(key, {})
        else:
            return f"{'.'.join(steps[:depth])} is the value {here!r}, not a table"
        if last:
            here[key] = value
        elif isinstance(here[key], str):  # loss = "ppo" is short for loss = {name = "ppo"}
            here[key] = {"name": here[key]}
        here = here[key]
    return ""


# --- messages ---


def join(path: str, key: str) -> str:
    """The key path of a key in the table at `path`; "" is the whole file."""
    return f"{path}.{key}" if path else key


def _listed(mistakes: list[str]) -> str:
    if len(mistakes) == 1:
        return mistakes[0]
    return f"{len(mistakes)} mistakes:" + "".join(f"\n  - {mistake}" for mistake in mistakes)


def missing(full: str) -> str:
    """The message for a required key that the run file lacks."""
    return f"{full}: missing, and it has no default"


def unknown_keys(full: str, value: Any, siblings: Sequence[str], everything: Sequence[str]) -> list[str]:
    """The messages for a key that no setting has; see `unknown_key`. A table of another library, such as verl's
    `actor_rollout_ref`, has one for each of its keys that has a counterpart here, and one for the others together."""
    known = _nearest_first(siblings, everything)
    leaves = list(_leaves(value, full)) if isinstance(value, Mapping) else []
    answers = {leaf: ours for leaf in leaves if (ours := ours_for(leaf, known) or _same_name(leaf, known))}
    if answers:
        others = ", ".join(leaf for leaf in leaves if leaf not in answers)
        rest = ours_for(full, known) or "remove what has no counterpart here"
        found = [f"{leaf}: unknown key; {ours}" for leaf, ours in answers.items()]
        return found + ([f"{others}: unknown; {rest}"] if others else [])
    return [unknown_key(full, siblings, everything)]


def _same_name(full: str, known: Sequence[str]) -> str:
    """The answer to a key of another library that a single setting here is called as well, or ""."""
    key = full.rpartition(".")[2]
    found = [path for path in known if path.rpartition(".")[2] == key]
    return f"did you mean {found[0]}?" if len(found) == 1 and key not in ("name", "path") else ""


def _leaves(values: Mapping[str, Any], path: str) -> Iterator[str]:
    """The key paths of the values that are no tables."""
    for key, value in values.items():
        yield from _leaves(value, join(path, key)) if isinstance(value, Mapping) else (join(path, key),)


def _nearest_first(siblings: Sequence[str], everything: Sequence[str]) -> list[str]:
    return [*siblings, *sorted((path for path in everything if path not in siblings), key=lambda p: p.count("."))]


def unknown_key(full: str, siblings: Sequence[str], everything: Sequence[str]) -> str:
    """The message for a key that no setting has, with the key that was probably meant. `siblings` are the keys of its
    table, and `everything` also includes those of the tables below it, all as full paths."""
    key = full.rpartition(".")[2]
    known = _nearest_first(siblings, everything)
    deeper = known[len(siblings) :]
    if ours := ours_for(full, known):
        return f"{full}: unknown key; {ours}"
    same_name = [p for p in deeper if p.rpartition(".")[2] == key]
    close = same_name or difflib.get_close_matches(full, siblings, 1) or difflib.get_close_matches(full, deeper, 1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(siblings))}"
    return f"{full}: unknown key; {hint}"


def _key_paths(cls: type, values: Mapping[str, Any], path: str) -> Iterator[str]:
    """Every key path under `path` that these values could set. A choice contributes the fields of the class that the
    values name, or of its default's class."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in _fields(cls):
        full, hint, value = join(path, field.name), _without_none(hints[field.name]), values.get(field.name, {})
        yield full
        if (choice := _choice(hint)) and not _is_tuple(hint) and isinstance(value, str | Mapping):
            try:
                inner = _class_of(choice.kind, value, _default(field, None), full)
            except ConfigError:  # reported where the choice itself is resolved
                continue
        elif dataclasses.is_dataclass(hint):
            inner = typing.cast(type, hint)
        else:
            continue
        yield from _key_paths(inner, value if isinstance(value, Mapping) else {}, full)


def _near_files(path: Path) -> str:
    if re.match(r"[A-Za-z_][\w.]*=", str(path)):
        return "a run file comes first and settings of the form key=value after it; the file may be empty"
    if not path.parent.is_dir():
        return f"there is no directory {str(path.parent)!r} either; check the path"
    files = [p.name for p in path.parent.iterdir() if p.suffix == ".toml"]
    close = difflib.get_close_matches(path.name, files, n=3, cutoff=0.4) or sorted(files)[:3]
    if not close:
        return f"there is no .toml file in {str(path.parent)!r}; check the path"
    return "did you mean " + " or ".join(str(path.parent / name) for name in close) + "?"


# --- the TOML writer ---


def _toml_lines(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    leaves = {k: v for k, v in values.items() if v is not None and not isinstance(v, Mapping) and not _is_tables(v)}
    for key, value in leaves.items():
        yield f"{toml_key(key)} = {toml_value(value)}"
    for key, value in values.items():
        inner = (*path, toml_key(key))
        if isinstance(value, Mapping):
            yield f"\n[{'.'.join(inner)}]"
            yield from _toml_lines(value, inner)
        elif _is_tables(value):
            for table in value:
                yield f"\n[[{'.'.join(inner)}]]"
                yield from _toml_lines(table, inner)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) for v in value)


def toml_key(key: str) -> str:
    """A key as TOML writes it, quoted if it holds more than letters, digits, `_` and `-`."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_value(value: Any) -> str:
    """One value as TOML writes it on a line, tables inline. Raises TypeError for what TOML cannot hold."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        # JSON escapes are TOML escapes, except that TOML also wants DEL escaped.
        return json.dumps(os.fspath(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        pairs = (f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(pairs) + "}"
    raise TypeError(f"{value!r} has no TOML form")
