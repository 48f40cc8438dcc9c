"""RULER's scores on cases counted by hand."""

from __future__ import annotations

import pytest

from longspan.evaluation.metrics.string_match import string_match_all, string_match_mean, string_match_part


def test_shares_of_what_occurs():
    assert string_match_all("It is 12 and ABC.", ["12", "abc"]) == 1.0
    assert string_match_all("It is 12.", ["12", "abc"]) == 0.5
    assert string_match_all("", ["12", "abc"]) == 0.0
    assert string_match_all("123", ["12"]) == 1.0  # as a part of something else, as in the published scripts


def test_any_of_the_references():
    assert string_match_part("In paris, France", ["Paris", "the city of Paris"]) == 1.0
    assert string_match_part("London", ["Paris", "the city of Paris"]) == 0.0
    assert string_match_mean("In Paris, France", ["Paris", "the city of Paris"]) == 0.5


def test_control_characters_are_line_breaks():
    assert string_match_part("\x01a\x02b\x00", ["a\nb"]) == 1.0


def test_no_references():
    for score in (string_match_all, string_match_part, string_match_mean):
        with pytest.raises(ValueError, match="no references"):
            score("a", [])
