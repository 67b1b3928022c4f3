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
