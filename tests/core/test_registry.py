"""Classes named by a file or a module: found, and every way not to find them explained."""

from __future__ import annotations

import sys

import pytest

from trimtab.core import registry
from trimtab.core.errors import ConfigError

MINE = """
from dataclasses import dataclass

from trimtab.math.advantages import Estimator


@dataclass(frozen=True, kw_only=True)
class Mine(Estimator):
    scale: float = 1.0


class Bare(Estimator):
    pass


@dataclass
class Other:
    pass


def function():
    pass
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def find(name, kind="advantage"):
    return registry.find(kind, name, where="advantage")


def test_a_class_in_a_file_is_found_and_known_by_that_name(file):
    name = f"{file}:Mine"
    cls = find(name)
    assert cls.__name__ == "Mine"
    assert find(name) is cls
    assert registry.name_of("advantage", cls) == name


def test_a_class_of_an_importable_module_is_found():
    assert find("trimtab.math.advantages:GRPO").__name__ == "GRPO"


def test_two_files_of_one_name_are_two_modules(tmp_path):
    found = []
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        path = tmp_path / directory / "mine.py"
        path.write_text(MINE.replace("1.0", "1.0" if directory == "a" else "2.0"))
        found.append(find(f"{path}:Mine")().scale)
    assert found == [1.0, 2.0]


def test_a_file_is_named_from_the_directory_the_command_runs_in(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert find("mine.py:Mine")().scale == 1.0


@pytest.mark.parametrize(
    ("name", "problem", "fix"),
    [
        ("{dir}/absent.py:Mine", "there is no file", "path/to/file.py:Name"),
        ("no_such_package.module:Mine", "ModuleNotFoundError", "package.module:Name"),
        ("{dir}/mine.txt:Mine", "there is no file", "path/to/file.py:Name"),
        ("{dir}/mine.py:Mime", "holds no class 'Mime'", "name one of its classes: Mine, Bare, Other"),
        ("{dir}/mine.py:", "holds no class ''", "Mine"),
        ("{dir}/mine.py:function", "holds no class 'function'", "Mine"),
        ("{dir}/empty.py:Mine", "holds no class 'Mine'", "it has none"),
        ("{dir}/mine.py:Other", "is no advantage: it has no __call__, no needs_critic", "docs/extending.md"),
        ("{dir}/broken.py:Mine", "ZeroDivisionError: division by zero (line 3)", "path/to/file.py:Name"),
        ("{dir}/syntax.py:Mine", "SyntaxError", "path/to/file.py:Name"),
        ("{dir}/imports.py:Mine", "ModuleNotFoundError: No module named 'nothing_like_it' (line 2)", "path/to/file.py"),
    ],
)
def test_whatever_is_wrong_with_a_name_is_explained(file, name, problem, fix):
    directory = file.parent
    (directory / "empty.py").write_text("")
    (directory / "broken.py").write_text("def f():\n    return 1\nx = f() / 0\n")
    (directory / "syntax.py").write_text("class Mine(:\n")
    (directory / "imports.py").write_text("\nimport nothing_like_it\n")
    with pytest.raises(ConfigError) as caught:
        find(name.format(dir=directory))
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert caught.value.where == "advantage"


def test_a_class_that_is_no_dataclass_itself_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE + "\n\nclass Undecorated(Mine):\n    extra: float = 2.0\n")
    for name in ("Undecorated", "Bare"):
        with pytest.raises(ConfigError, match=f"'{name}' in .* is no dataclass") as caught:
            find(f"{path}:{name}")
        assert "put @dataclass(frozen=True, kw_only=True) above the class" in caught.value.fix


def test_a_file_that_was_mended_is_read_again(tmp_path):
    path = tmp_path / "mended.py"
    path.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        find(f"{path}:Mine")
    path.write_text(MINE)
    assert find(f"{path}:Mine").__name__ == "Mine"


@pytest.mark.parametrize("kind", registry._OFFERS)
def test_every_class_of_the_package_has_what_its_kind_offers(kind):
    for name in registry.names(kind):
        cls = registry.find(kind, name, where="")
        assert registry._of_kind(kind, cls, name, where="") is cls


def test_a_class_that_was_imported_is_named_by_its_module(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    import mine

    assert registry.name_of("advantage", mine.Mine) == "mine:Mine"
    assert find("mine:Mine") is mine.Mine


def test_a_class_of_a_notebook_is_answered_with_where_to_put_it():
    cell: dict = {"__name__": "__main__"}
    exec(MINE, cell)
    with pytest.raises(ConfigError, match="Mine is a class of a notebook") as caught:
        registry.name_of("advantage", cell["Mine"])
    assert "from my_advantage import Mine" in caught.value.fix
