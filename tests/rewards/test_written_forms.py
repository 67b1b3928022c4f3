"""Answers in further forms: those of the same value score 1, and those that look alike and are of another value 0."""

from __future__ import annotations

import time

import pytest

from trimtab.rewards.answers import ExactAnswer, find_answer
from trimtab.rewards.written import same_text

MATRIX = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"

RIGHT = [
    ("1, 2", "1 and 2"),
    ("1, 2, 3", "1, 2, and 3"),
    (r"x = 1 \text{ and } x = 2", "1, 2"),
    ("5", r"5^\circ\text{C}"),
    ("5°C", r"5^\circ C"),
    # marks of Markdown and LaTeX within the answer
    ("72", "**Answer:** 72"),
    ("72", "**72** apples"),
    ("72", "The answer is **72**."),
    ("B", "**Answer: B**"),
    ("B", "Answer: **B**"),
    ("72", "$72$ apples"),
    ("72", r"\(72\) apples"),
    ("72", "$$72$$"),
    ("72", r"\[72\]"),
    ("72", "$x = 72$"),
    ("72", r"$\boxed{72}$"),
    ("72", '"72"'),
    ("Paris", "“Paris”"),
    ("72", "72。"),
    ("10**3", "1000"),
    ("1000", "10 ** 3"),
    # money
    ("72", "72$"),
    ("$72", r"72\$"),
    ("1200", "US$1,200"),
    ("$1,200.50", "1200.50 dollars"),
    ("500", "₹500"),
    ("₹500", "500 rupees"),
    ("500", "INR 500"),
    ("-5", "-₹5"),
    # powers and fractions
    ("3e8", "3 × 10⁸"),
    ("1e-3", "10⁻³"),
    ("100", "10²"),
    ("2^{10}", "2¹⁰"),
    ("x^4", "x⁴"),
    ("x^{-1}", "x⁻¹"),
    ("1/2", "½"),
    ("1.5", "1½"),
    ("1.5", "1 ½"),
    ("2.75", "x = 2 ¾"),
    ("0.5", "the answer is ½"),
    ("3.0e8", "3.0E+8"),
    # roots, pi and simple fractions of them
    (r"\sqrt{12}", "√12"),
    (r"\sqrt{12}", "sqrt(12)"),
    (r"2\sqrt{3}", "2√3"),
    (r"2\sqrt{3}", "2*sqrt(3)"),
    (r"2\sqrt{3}", r"2 \cdot \sqrt{3}"),
    (r"\sqrt{x+1}", "√(x+1)"),
    (r"\frac{\pi}{2}", "π/2"),
    (r"\frac{\pi}{2}", "pi/2"),
    (r"\frac{3\pi}{4}", "3π/4"),
    (r"\frac{\sqrt{3}}{2}", "√3/2"),
    (r"\frac{\sqrt{3}}{2}", "sqrt(3)/2"),
    (r"\frac{1}{x}", "1/x"),
    (r"\frac{1}{\sqrt{2}}", "1/√2"),
    ("2π", "2*pi"),
    (r"-\frac{\pi}{6}", "-π/6"),
    (r"\frac{2\sqrt{5}}{5}", r"\dfrac{2 \sqrt{5}}{5}"),
    # intervals, unions, matrices
    (r"(-\infty, 2]", "(−∞, 2]"),
    (r"(-\infty,-1)\cup(1,\infty)", "(−∞, −1) ∪ (1, ∞)"),
    (r"\left[\frac{1}{2}, \infty\right)", "[0.5, ∞)"),
    (MATRIX, r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (MATRIX, r"$\begin{bmatrix} 1.0 & 4/2 \\ 3 & 4 \\ \end{bmatrix}$."),
    (MATRIX, r"A = \begin{pmatrix} 1 & 2\\3 & 4\end{pmatrix}"),
    # times, alternatives, choices with their value
    ("5 PM", "5:00 p.m."),
    ("12:30 PM", "12:30pm"),
    ("5 PM", "5"),
    ("9:05 a.m.", "9:05 AM"),
    ("x=1 or x=2", "x=2 or x=1"),
    ("1 or 2", r"2\text{ or }1"),
    ("2 or -2", "−2 or 2"),
    ("72", "(B) 72"),
    ("72", r"\textbf{(B) } 72"),
    ("72", "C) 72 apples"),
    ("Paris", "(A) Paris"),
    # units behind what is no plain number
    (r"2\sqrt{3}", r"2\sqrt{3}\text{ cm}"),
    (r"4\pi", "4π cm"),
    (r"4\pi \text{ cm}^2", r"4\pi"),
    (r"9\pi", "9π square units"),
    (r"72", r"72 \text{ cm}^2"),
    ("72", r"72\,\mathrm{km/h}"),
    ("7/8", "7/8 inch"),
]

WRONG = [
    ("1, 2", "2 and 1"),
    ("(1, 2)", "1 and 2"),
    ("1", "1 and 2"),
    ("5°F", r"5^\circ C"),
    ("72", "**7** or **2**"),
    ("23", "2 ** 3"),
    ("72", "$7$ $2$"),
    ("5", "5²"),
    ("5", "5⁻¹"),
    ("5", "5 $ x"),
    ("5", "2½"),
    ("1/2", "1½"),
    ("0.5", "⅓"),
    ("12", "1½2"),
    (r"\sqrt{12}", "√1·2"),
    (r"\sqrt{2}", "sqrt(3)"),
    ("2", "√4"),
    (r"\frac{\pi}{2}", "2/π"),
    (r"\frac{1}{2x}", "1/2x"),
    (r"\frac{a+b}{2}", "a+b/2"),
    (r"\frac{x}{2y}", "x/2y"),
    ("π", "pie"),
    (MATRIX, r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
    (MATRIX, r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    (MATRIX, r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}"),
    (MATRIX, r"2\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (MATRIX, "1, 2, 3, 4"),
    ("5 PM", "5 AM"),
    ("5:00 PM", "5:30 PM"),
    ("5 PM", "6"),
    ("1 or 2", "1"),
    ("1 or 2", "1 or 2 or 3"),
    ("1 or 2", "1 or 3"),
    ("1", "1 or 2"),
    ("72", "(B) 71"),
    ("72", "(A) 71 (B) 72"),
    ("B", "(A) B"),
    (r"2\sqrt{3}", r"2\sqrt{3}\text{ or } 4"),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}\text{ km}"),
    (r"4\pi", "4π r"),
    ("€5", "5$"),
    ("₹5", "$5"),
    (r"(-\infty, 2]", "(∞, 2]"),
    ("x^4", "x⁵"),
    ("1e8", "10⁹"),
]


@pytest.mark.parametrize(("right", "given"), RIGHT)
def test_an_answer_of_the_same_value_is_right(right, given):
    assert same_text(right, given)


@pytest.mark.parametrize(("right", "given"), WRONG)
def test_an_answer_that_looks_alike_and_is_of_another_value_is_wrong(right, given):
    assert not same_text(right, given)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>It is 71.</think><answer>72</answer>", "72"),
        ("<answer>1</answer> no, <answer>\n72\n</answer>", "72"),
        (r"<answer>\boxed{72}</answer>", "72"),
        ("<answer>#### 72</answer>", "72"),
        ("#### 72<|im_end|>", "72"),
        ("#### x < 3", "x < 3"),
        ("<answer>72", None),
        ("</answer>72<answer>", None),
        ("<answer> </answer>", None),
    ],
)
def test_an_answer_stands_in_its_tag(reply, answer):
    assert find_answer(reply, ExactAnswer().forms) == answer


@pytest.mark.parametrize("part", ["1", r"\frac{", r"\sqrt{1}", "½", "a or ", "$1", "** ", r"\alpha", "(B) ", "√("])
def test_no_long_answer_takes_long(part):
    """What is compared is written by a policy, so no text may take more than a moment."""
    begun = time.process_time()
    assert not same_text(r"\frac{\pi}{2}", part * 3000)
    assert not same_text("72", part * 3000 + "x")
    assert time.process_time() - begun < 2
