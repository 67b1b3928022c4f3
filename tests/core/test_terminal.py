"""Texts of strangers cannot steer a terminal, or end a command because its output cannot be encoded."""

import pytest

from trimtab.core.terminal import note, printable, say, visible, warn


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\nHello\r\n  you", "␛[2J Hello you"),
        ("a\u202eb\u200bc", "a\\u{202e}b\\u{200b}c"),
        ("half \ud83d", "half \\u{d83d}"),
        ("\x9b31m", "\\u{9b}31m"),
        ("Zürich 東京 😀", "Zürich 東京 😀"),
    ],
)
def test_a_text_on_one_line_cannot_steer_the_terminal(text, shown):
    assert printable(text) == shown


def test_line_breaks_are_what_the_caller_says():
    assert visible("a\n\tb") == "a⏎\n␉b"
    assert visible("a\nb", newline="\n") == "a\nb"


def test_what_a_model_said_keeps_its_lines_and_joiners(capsys):
    say("def f():\n\treturn\x1b]0;title\x07 नमस्\u200dते \ud83d")
    assert capsys.readouterr().out == "def f():\n\treturn␛]0;title␇ नमस्\u200dते \\u{d83d}\n"


def test_what_stands_beside_results_goes_to_stderr(capsys):
    note("three rows are left out")
    warn("the card is of another model")
    assert capsys.readouterr() == ("", "note: three rows are left out\nwarning: the card is of another model\n")
