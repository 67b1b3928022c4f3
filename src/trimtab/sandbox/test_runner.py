"""The examiner and the candidate: tests run in one process, the code under test in another.

They talk over a socket. Plain values cross it as copies; the candidate's functions, classes and objects stay where
they are, and the examiner holds a `Remote` in their place. So the process that runs foreign code contains nothing of
the tests, of the harness or of the verdict: to pass a test, the code has to return the right values.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from .rpc import Connection, Gone, Refused, Stream

_BUILTINS = ("getattr", "setattr", "len", "bool", "str", "repr", "iter", "isinstance")
_ITEM_OPERATORS = ("getitem", "setitem", "delitem", "contains")
_SAME_TYPE_OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge")
_BINARY_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")


# --- the process that runs foreign code ---


class Candidate(Connection):
    """Serves the names of its module. Nothing here is worth protecting: the code can do all that this process can."""

    def serve(self, source: str) -> None:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        failure: BaseException | None = None
        try:
            exec(compile(source, "solution.py", "exec"), module.__dict__)
        except BaseException as error:  # SystemExit too: whatever it is, the module did not load
            failure = error
        message = self.receive()
        assert message == ["names"]
        if failure is not None:
            self._send_error(failure)
        else:
            public = {k: v for k, v in vars(module).items() if not k.startswith("__")}
            self.send(["answer", {name: self.encode(value) for name, value in public.items()}])
        while True:
            self.answer(self.receive())

    def answer(self, message: list[Any]) -> None:
        what, *arguments = message
        try:
            values = [self.decode(a) for a in arguments]
            result = _DO[what](*values)
            # Lists and dicts that were changed in place are sent back as they are now.
            after = [self.encode(a) if type(a) in (list, dict, set) else None for a in values]
            reply = ["answer", self.encode(result), after]
        except BaseException as error:
            self._send_error(error)
        else:
            self.send(reply)

    def _send_error(self, error: BaseException) -> None:
        plain = len(error.args) == 1 and type(error.args[0]) is str
        self.send(["error", *_described(type(error)), (error.args[0] if plain else str(error))[:2000]])

    def encode_other(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return ["m", value.__name__]
        if isinstance(value, type) and issubclass(value, Exception):
            return ["x", *_described(value)]
        return ["o", self.keep(value)]

    def decode_other(self, tag: str, parts: list[Any]) -> Any:
        if tag == "o":
            return self.handles[parts[0]]
        handle = parts[0]

        def callback(*arguments: Any) -> Any:
            answer = self.ask("callback", handle, *map(self.encode, arguments))
            if answer[0] == "error":
                raise getattr(builtins, answer[1], RuntimeError)(answer[2])
            return self.decode(answer[1])

        return callback


def _described(kind: type[BaseException]) -> list[str]:
    """The name of an exception class, and the name of the first class above it that is built in."""
    base = next(c for c in kind.__mro__ if getattr(builtins, c.__name__, None) is c)
    return [kind.__name__, base.__name__]


def _call(target: Callable[..., Any], keywords: dict[str, Any], *arguments: Any) -> Any:
    return target(*arguments, **keywords)


def _next(iterator: Iterator[Any]) -> list[Any]:
    """The next value in a list, or an empty one."""
    for value in iterator:
        return [value]
    return []


_DO: dict[str, Callable[..., Any]] = {
    "call": _call,
    "next": _next,
    **{name: getattr(builtins, name) for name in _BUILTINS},
    **{name: getattr(operator, name) for name in _ITEM_OPERATORS + _SAME_TYPE_OPERATORS + _BINARY_OPERATORS},
}


# --- the process that runs the tests ---


class Remote:
    """An object of the candidate, as the tests see it.

    The process of the tests makes the decisions: a Remote equals no plain value, whatever it says of itself, and what
    is computed from it and a plain value is never accepted as a plain value.
    """

    __slots__ = ("_examiner", "_handle")

    def __init__(self, examiner: Examiner, handle: int) -> None:
        object.__setattr__(self, "_examiner", examiner)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._examiner.do("call", self, keywords, *arguments)

    def __getattr__(self, name: str) -> Any:
        return self._examiner.do("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._examiner.do("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._examiner.do("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._examiner.do("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._examiner.do("delitem", self, key)

    def __contains__(self, item: Any) -> bool:
        return self._examiner.do("contains", self, item) is True

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and self._examiner.do("isinstance", instance, self) is True

    def __iter__(self) -> Iterator[Any]:
        iterator = self._examiner.do("iter", self)
        while found := self._examiner.do("next", iterator):
            yield found[0]

    def __next__(self) -> Any:
        found = self._examiner.do("next", self)
        if not found:
            raise StopIteration
        return found[0]

    def __len__(self) -> int:
        return int(self._examiner.do("len", self))

    def __bool__(self) -> bool:
        return self._examiner.do("bool", self) is True

    def __str__(self) -> str:
        return str(self._examiner.do("str", self))

    def __repr__(self) -> str:
        return str(self._examiner.do("repr", self))

    def __hash__(self) -> int:
        return hash(self._handle)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._examiner.do("eq", self, other) is True

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, Remote) or self._examiner.do("ne", self, other) is True


def _compared(name: str) -> Callable[[Remote, Any], Any]:
    def compare(self: Remote, other: Any) -> Any:
        return self._examiner.do(name, self, other) is True if isinstance(other, Remote) else NotImplemented

    return compare


def _computed(name: str, *, reflected: bool) -> Callable[[Remote, Any], Any]:
    def compute(self: Remote, other: Any) -> Any:
        result = self._examiner.do(name, other, self) if reflected else self._examiner.do(name, self, other)
        if isinstance(result, Remote) or isinstance(other, Remote):
            return result
        raise TypeError(f"the code under test turned an object of its own and {other!r} into a plain value")

    return compute


for _name in _SAME_TYPE_OPERATORS[2:]:
    setattr(Remote, f"__{_name}__", _compared(_name))
for _name in _BINARY_OPERATORS:
    setattr(Remote, f"__{_name.strip('_')}__", _computed(_name, reflected=False))
    setattr(Remote, f"__r{_name.strip('_')}__", _computed(_name, reflected=True))


class Examiner(Connection):
    """Runs the tests. The candidate sees only those of its objects that are functions passed on by a test, and can only
    call them."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.errors: dict[str, type[Exception]] = {}

    def names(self, entry_points: list[str]) -> dict[str, Any]:
        """The names that the candidate defines and the tests may use, with their values.

        The candidate may not redefine a name of Python's own, such as `abs`, because it would then judge itself with
        it. An entry point is the exception. If there are entry points, nothing else is taken from the candidate.
        """
        answer = self.ask("names")
        if answer[0] == "error":
            raise self._error(answer)
        names = {}
        for name, value in dict(answer[1]).items():
            if isinstance(value, list) and value and value[0] == "m":
                if value[1] in sys.stdlib_module_names:
                    names[name] = importlib.import_module(value[1])
            elif name in entry_points or not (
                entry_points or hasattr(builtins, name) or name in sys.stdlib_module_names
            ):
                names[name] = self.decode(value)
        return names

    def do(self, what: str, *values: Any) -> Any:
        """The result of an operation in the candidate's process. Raises what it raises there."""
        answer = self.ask(what, *[self.encode(v) for v in values])
        if answer[0] == "error":
            raise self._error(answer)
        try:
            _, result, after = answer
            for value, changed in zip(values, after, strict=True):
                _update(value, self.decode(changed) if changed is not None else value)
            return self.decode(result)
        except (TypeError, ValueError, KeyError, RecursionError, AttributeError) as error:
            raise Gone("an answer of no known form") from error

    def _error(self, answer: list[Any]) -> Exception:
        _, name, base, message = map(str, answer)
        kind = self.error_class(name, base)
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError, for example, needs more than a message
            return kind.__new__(kind)

    def error_class(self, name: str, base: str) -> type[Exception]:
        """The exception class of that name: Python's own, or a class made here in place of the candidate's."""
        own = getattr(builtins, name, None)
        if isinstance(own, type) and issubclass(own, Exception):
            return own
        if name not in self.errors:
            above = getattr(builtins, base, Exception)
            ordinary = isinstance(above, type) and issubclass(above, Exception)
            self.errors[name] = type(name, (above if ordinary else RuntimeError,), {})
        return self.errors[name]

    def answer(self, message: list[Any]) -> None:
        what, handle, *arguments = message
        if what != "callback" or handle not in self.handles:
            raise Gone("a request of no known form")
        try:
            result = self.handles[handle](*map(self.decode, arguments))
            reply = ["answer", self.encode(result)]
        except Exception as error:
            self.send(["error", type(error).__name__, str(error)[:2000]])
        else:
            self.send(reply)

    def encode_other(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return ["o", value._handle]
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
            return ["call", self.keep(value)]
        if isinstance(value, types.ModuleType):
            raise TypeError(f"the module {value.__name__} was passed to the code under test")
        raise Refused(
            f"a test passes a {type(value).__name__} to the code under test; plain values, functions and "
            "the code's own objects can be passed"
        )

    def decode_other(self, tag: str, parts: list[Any]) -> Any:
        if tag == "x":
            return self.error_class(str(parts[0]), str(parts[1]))
        if tag == "o":
            return Remote(self, int(parts[0]))
        raise Gone("a value of no known form")


def _update(value: Any, changed: Any) -> None:
    if type(value) is not type(changed) or value is changed:
        return
    if isinstance(value, list):
        value[:] = changed
    elif isinstance(value, dict | set):
        value.clear()
        value.update(changed)


# --- what the two processes run ---


def run_candidate(source: str, socket: int) -> NoReturn:
    """Loads the code and serves it until the socket closes."""
    sys.set_int_max_str_digits(0)
    try:
        with os.fdopen(socket, "r+b", buffering=0) as raw:
            Candidate(Stream(raw)).serve(source)
    finally:
        os._exit(0)


def run_examiner(asked: dict[str, Any], socket: int, verdict: int) -> NoReturn:
    """Runs `asked["tests"]` one by one; writes the result "ready", then a result for each test, as JSON lines."""
    sys.set_int_max_str_digits(0)
    with os.fdopen(socket, "r+b", buffering=0) as raw, os.fdopen(verdict, "w", encoding="utf-8") as out:

        def say(result: str, message: str = "") -> None:
            out.write(json.dumps({"result": result, "message": message[:2000]}) + "\n")
            out.flush()

        entry_points: list[str] = asked["entry_points"]
        try:
            setup, *tests = [compile(test, "<test>", "exec") for test in [asked["setup"], *asked["tests"]]]
            for entry_point in entry_points:
                compile(entry_point, "<entry point>", "eval")
        except (SyntaxError, ValueError) as error:
            say("refused", f"the tests are no Python: {error}")
            os._exit(0)
        say("ready")
        if all(passes_without_code(setup, test, entry_points) for test in tests):
            say("refused", "they pass without any code, as tests do that are only defined and never called")
            os._exit(0)
        examiner = Examiner(Stream(raw))
        names: dict[str, Any] | None = None
        for test in tests:
            try:
                if names is None:
                    names = examiner.names([name_in(entry_point) for entry_point in entry_points])
                run_test(setup, test, names, entry_points)
            except Refused as error:
                say("refused", str(error))
            except BaseException as error:  # a test fails whatever it raises
                say("failed", f"{type(error).__name__}: {error}")
                if isinstance(error, Gone) or names is None:
                    break
            else:
                say("passed")
    os._exit(0)


def name_in(entry_point: str) -> str:
    """The name that the code has to define for an entry point: "Solution" for "Solution().two_sum"."""
    return re.split(r"\W", entry_point.strip())[0]


def passes_without_code(setup: types.CodeType, test: types.CodeType, entry_points: list[str]) -> bool:
    """Whether a test passes when the code under test defines nothing, so that it judges nothing."""
    # None, because an entry point may have a name of Python's own, such as `sum`, which would pass.
    nothing = dict.fromkeys(map(name_in, entry_points))
    try:
        run_test(setup, test, nothing, entry_points)
    except BaseException:  # a test fails whatever it raises
        return False
    return True


def run_test(setup: types.CodeType, test: types.CodeType, names: dict[str, Any], entry_points: list[str]) -> None:
    """Runs one test with the names of the code under test, which it may also import from `solution`. Raises what the
    test raises."""
    module = types.ModuleType("solution")
    vars(module).update(names)
    sys.modules["solution"] = module
    namespace = dict(names, __name__="tests")
    exec(setup, namespace)
    exec(test, namespace)
    run_collected(namespace, names, entry_points)


def run_collected(namespace: dict[str, Any], names: dict[str, Any], entry_points: list[str]) -> None:
    """Calls what a test only defines: functions `test…`, `unittest` cases, and `check` with each entry point."""
    unittest = sys.modules.get("unittest")
    for name, value in list(namespace.items()):
        if unittest is not None and isinstance(value, type) and issubclass(value, unittest.TestCase):
            result = unittest.TestLoader().loadTestsFromTestCase(value).run(unittest.TestResult())
            for _, report in [*result.errors, *result.failures]:
                raise AssertionError(report.strip().rpartition("\n")[2])
        elif isinstance(value, types.FunctionType) and name.startswith("test"):
            value()
        elif isinstance(value, types.FunctionType) and name == "check":
            for entry_point in entry_points:
                assert name_in(entry_point) in names, f"the code defines no {name_in(entry_point)}"
                value(eval(entry_point, dict(names)))
