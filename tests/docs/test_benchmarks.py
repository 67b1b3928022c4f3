"""The scripts under benchmarks/ stand on the import path of TRL's interpreter, whose libraries must not find them."""

from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONAL = {"kernels", "datasets", "accelerate", "peft", "deepspeed", "vllm", "evaluate", "optimum", "tokenizers"}
"""Libraries that transformers and TRL import where they find a module of that name."""


def test_no_script_has_the_name_of_a_library_that_transformers_looks_for():
    # A kernels.py was taken for Hugging Face's `kernels`, and TRL's side could not import its Trainer.
    assert not {path.stem for path in BENCHMARKS.glob("*.py")} & OPTIONAL
