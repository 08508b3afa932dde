from __future__ import annotations

import pytest
from effref.parsing import parse_choices, parse_lengths, parse_names, parse_settings

from refimpl.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", (512,)),
        ("1024,512,512", (512, 1024)),
        ("2^9:2^13", (512, 1024, 2048, 4096, 8192)),
        ("7, 2^3:16,100", (7, 8, 16, 100)),
        ("2^0", (1,)),
        ("64:64", (64,)),
    ],
)
def test_lengths(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-4",
        "1.5",
        "a",
        "512,",
        "2^",
        "3^4",
        "2^41",
        "2^9:",
        "100:200",
        "2^9:2^8",
        "2^-3",
        "٣²",
        "9" * 30,
        "1_0",
    ],
)
def test_wrong_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^(length|range)"):
        parse_lengths(text)


def test_names() -> None:
    assert parse_names("reuse, dense,reuse") == ("reuse", "dense")
    with pytest.raises(ConfigError, match="empty name"):
        parse_names("reuse,,dense")


def test_settings_are_json_or_text() -> None:
    given = ["reuse.group=4", "reuse.groups=[[0,1],[2,3]]", "reuse.output_projection=false", "reuse.share=scores"]
    assert parse_settings(given) == {
        "reuse": {"group": 4, "groups": [[0, 1], [2, 3]], "output_projection": False, "share": "scores"}
    }


def test_a_value_that_is_nested_too_deeply_is_text() -> None:
    deep = "[" * 100_000
    assert parse_settings([f"reuse.groups={deep}"]) == {"reuse": {"groups": deep}}


@pytest.mark.parametrize("item", ["group=4", "reuse.group", "reuse.=4", ""])
def test_wrong_settings(item: str) -> None:
    with pytest.raises(ConfigError, match=r"METHOD\.PARAMETER=VALUE"):
        parse_settings([item])


def test_setting_of_an_unknown_method() -> None:
    with pytest.raises(ConfigError, match="did you mean 'reuse'"):
        parse_settings(["resue.group=4"])


def test_choices_are_split_outside_of_brackets() -> None:
    parse = parse_choices("--over")
    assert parse(["reuse.group=1,2, 4", "reuse.groups=[[0,1]],[[0],[1]]", "kvsharer.order=similar,random"]) == {
        "reuse": {"group": (1, 2, 4), "groups": ([[0, 1]], [[0], [1]])},
        "kvsharer": {"order": ("similar", "random")},
    }
    assert parse(["reuse.group=3"]) == {"reuse": {"group": (3,)}}
    with pytest.raises(ConfigError, match=r"--over 'reuse\.group' is not"):
        parse(["reuse.group"])
