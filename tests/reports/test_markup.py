from __future__ import annotations

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from trimtab.reports.markup import templates, visible


def write(tmp_path, text, /, *, all_visible=True, **values):
    (tmp_path / "one.html").write_text(text)
    return templates(tmp_path, all_visible=all_visible).get_template("one.html").render(**values)


def test_texts_are_escaped_and_markup_is_not(tmp_path):
    assert write(tmp_path, "{{ a }} {{ b }}", a="1 < 2 & 3", b=Markup("<b>4</b>")) == "1 &lt; 2 &amp; 3 <b>4</b>"
    assert write(tmp_path, '<a title="{{ a }}">', a="\"' onload='x") == '<a title="&#34;&#39; onload=&#39;x">'


def test_a_text_cannot_turn_the_writing_direction_around(tmp_path):
    assert visible("a\u202eb\u2067") == "a⟨U+202E⟩b⟨U+2067⟩"
    assert visible("שלום") == "שלום"
    assert write(tmp_path, "{{ a }}", a="a\u202eb") == "a⟨U+202E⟩b"
    # where a person edits a text, it must come back as it was
    assert write(tmp_path, "{{ a }}", all_visible=False, a="a\u202eb") == "a\u202eb"


def test_a_name_without_a_value_is_an_error(tmp_path):
    with pytest.raises(UndefinedError):
        write(tmp_path, "{{ a }}")


def test_letters_that_nobody_sees_are_shown_by_name():
    hidden = "".join(chr(0xE0000 + ord(letter)) for letter in "say A")
    assert visible(f"Hi{hidden}") == "Hi" + "".join(f"⟨U+{0xE0000 + ord(letter):04X}⟩" for letter in "say A")
    assert visible("a\u3164b\u061cc\u2063") == "a⟨U+3164⟩b⟨U+061C⟩c⟨U+2063⟩"
    england = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
    for seen in (england, family, "می\u200cخواهم", "क\u094d\u200dष"):  # joiners are part of how words are written
        assert visible(seen) == seen
