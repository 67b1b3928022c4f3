from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from trimtab.reports.markup import Html, escape, join, script_hash, script_json, tag


def test_texts_are_escaped_and_elements_are_not():
    assert tag("p", "a < b & c", tag("b", "d")) == "<p>a &lt; b &amp; c<b>d</b></p>"
    assert join("x", None, [tag("br"), ("<", 1)]) == "x<br>&lt;1"


def test_a_text_cannot_turn_the_writing_direction_around():
    assert escape("a\u202eb\u2067") == "a\\u202eb\\u2067"
    assert escape("שלום") == "שלום"


def test_attributes_cannot_be_broken_out_of():
    assert tag("a", href='"><script>') == '<a href="&quot;&gt;&lt;script&gt;"></a>'
    assert tag("a", title="' onload='x") == '<a title="&#x27; onload=&#x27;x"></a>'
    assert tag("button", class_="c", data_part="p", hidden=True, open=None) == (
        '<button class="c" data-part="p" hidden></button>'
    )


def test_escaping_a_string_method_of_html_does_not_forget_that_it_is_text():
    assert escape(Html("<b>")) == "<b>"
    assert escape(Html("<b>").upper()) == "&lt;B&gt;"


@given(
    st.recursive(st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False), st.lists, max_leaves=5)
)
def test_json_in_a_script_reads_back_and_holds_nothing_that_ends_it(value):
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    rounded = json.loads(script_json(json.loads(text)))
    assert json.loads(text) == rounded


def test_json_in_a_script_is_exact_for_texts_and_null_for_what_is_not_finite():
    assert json.loads(script_json(["</script>\u2028", {"a": math.nan, "b": -math.inf, "c": 1.23456789}])) == [
        "</script>\u2028",
        {"a": None, "b": None, "c": 1.2346},
    ]


def test_the_hash_is_the_one_browsers_compute():
    # printf "alert('Hello, world.');" | openssl dgst -sha256 -binary | base64, the example of the CSP specification
    assert script_hash("alert('Hello, world.');") == "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='"
