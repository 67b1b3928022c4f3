"""The scripts under benchmarks/ stand on the import path of TRL's interpreter, whose libraries must not find them."""

import re
from pathlib import Path

import transformers.utils.import_utils

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LOOKED_FOR = re.compile(r"""_is_package_available\(\s*["']([\w.]+)["']""")


def test_no_script_has_the_name_of_a_library_that_transformers_looks_for():
    # A kernels.py was taken for Hugging Face's `kernels`, and TRL's side could not import its Trainer.
    source = Path(transformers.utils.import_utils.__file__).read_text(encoding="utf-8")
    looked_for = {name.partition(".")[0] for name in LOOKED_FOR.findall(source)}
    assert {"kernels", "datasets", "peft"} <= looked_for
    assert not {path.stem for path in BENCHMARKS.glob("*.py")} & looked_for
