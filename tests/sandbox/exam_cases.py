"""Code with a test that holds for it: what crosses between the two processes of an exam, and how."""

CASES = {
    "arguments": ("def f(*a, **k): return a, k", "assert f(1, 'x', b=[2.5]) == ((1, 'x'), {'b': [2.5]})"),
    "values keep their types": (
        "def f(x): return x",
        """
values = [None, True, 10**5000, -0.5, 'é\\ud800', b'\\xff', 1j, range(3), {1, 2}, frozenset({3}), {(1, 2): [3]}]
for value in [*values, float('inf')]:
    assert f(value) == value and type(f(value)) is type(value), value
""",
    ),
    "nan": ("def f(): return float('nan')", "assert f() != f()"),
    "counters are dicts": (
        "import collections\ndef f(): return collections.Counter('aab')",
        "assert f() == {'a': 2, 'b': 1}",
    ),
    "a list changed in place": ("def f(x): x.append(1); x.sort()", "v = [3, 2]\nf(v)\nassert v == [1, 2, 3]"),
    "a dict changed in place": ("def f(x): x['a'] = 1", "v = {}\nf(v)\nassert v == {'a': 1}"),
    "an exception of Python's": (
        "def f(): raise ValueError('no')",
        """
try: f()
except ValueError as error: assert str(error) == 'no'
else: assert False
""",
    ),
    "messages of exceptions": (
        "def f(x): return {}[x] if x else b'\\xff'.decode()",
        """
try: f('no')
except KeyError as error: assert error.args == ('no',)
else: assert False
try: f('')
except UnicodeDecodeError: pass
else: assert False
""",
    ),
    "an exception of its own": (
        "class Mine(KeyError): pass\ndef f(): raise Mine('no')",
        """
try: f()
except Mine: pass
else: assert False
""",
    ),
    "an exception of its own by its base": (
        "class Mine(KeyError): pass\ndef f(): raise Mine('no')",
        """
try: f()
except KeyError: pass
else: assert False
""",
    ),
    "a function of the test's": ("def f(g, x): return g(x) + 1", "assert f(lambda x: 2 * x, 3) == 7"),
    "an exception in a function of the test's": (
        """
def f(g):
    try: g()
    except ValueError as error: return str(error)
""",
        """
def g(): raise ValueError('w')
assert f(g) == 'w'
""",
    ),
    "generators": ("def f():\n    yield from range(3)", "assert list(f()) == [0, 1, 2] and next(f()) == 0"),
    "functions that make functions": ("def f(n): return lambda x: x + n", "assert f(1)(2) == 3"),
    "modules and constants": ("import math\nX = 3", "assert math.pi > X"),
    "imported by the test": ("def f(): return 1", "from solution import f as g\nassert g() == 1"),
    "a class": (
        """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __contains__(self, x): return x in self.items
    def __getitem__(self, i): return self.items[i]
    def __setitem__(self, i, x): self.items[i] = x
    def __delitem__(self, i): del self.items[i]
    def __str__(self): return 'Stack'
    def __bool__(self): return bool(self.items)
""",
        """
s = Stack()
assert not s
s.push(3); s.push(4)
assert len(s) == 2 and 3 in s and s[0] == 3 and str(s) == 'Stack'
s[0] = 5
del s[1]
assert s.items == [5] and s.pop() == 5 and isinstance(s, Stack)
s.items = [9]
assert s.pop() == 9
""",
    ),
    "operators": (
        """
class V:
    def __init__(self, x): self.x = x
    def __add__(self, other): return V(self.x + other.x)
    def __mul__(self, n): return V(self.x * n)
    __rmul__ = __mul__
    def __eq__(self, other): return self.x == other.x
    def __lt__(self, other): return self.x < other.x
""",
        """
assert V(1) + V(2) == V(3) and V(1) != V(2) and V(1) < V(2)
assert V(2) * 3 == V(6) == 3 * V(2)
assert sorted([V(2), V(1)])[0].x == 1
""",
    ),
}
