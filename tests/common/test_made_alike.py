"""One comparison of settings, wherever they are kept."""

from pathlib import Path

import pytest

from common.made_alike import check_same, differences


def test_numbers_are_equal_however_they_are_written():
    stored = {
        "ratio": "15",
        "rate": "0.00015",
        "seed": 1,
        "flag": "True",
        "path": "/a",
        "off": None,
    }
    wanted = {"ratio": 15.0, "rate": 1.5e-4, "seed": "1", "flag": True, "path": Path("/a")}
    assert differences(stored, wanted | {"off": None}, {}) == []


def test_a_setting_that_came_later_counts_as_the_older_behaviour():
    older = {"drop_path": 0.0, "loss": "mse"}
    assert differences({}, {"drop_path": 0.0, "loss": "mse"}, older) == []
    assert differences({}, {"drop_path": 0.1}, older) == ["drop_path: 0.0 -> 0.1"]
    assert differences({"drop_path": 0.1}, {"drop_path": 0.0}, older) == ["drop_path: 0.1 -> 0.0"]


def test_true_is_not_one_and_text_is_not_none():
    assert differences({"a": True}, {"a": 1}, {})
    assert differences({"a": None}, {"a": "x"}, {})
    assert differences({"a": (1, 2)}, {"a": [1, 2]}, {}) == []


def test_the_error_names_what_differs_and_what_to_do():
    with pytest.raises(ValueError, match=r"run was made with .*\(seed: 0 -> 1\); use those, or"):
        check_same({"seed": 0}, {"seed": 1}, {}, what="run")
