"""Made with the same settings? Asked here, whoever asks and wherever the settings are kept."""

from collections.abc import Mapping
from typing import Any

from common.yamlfile import plain


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], older: Mapping[str, Any]
) -> list[str]:
    """`name: stored -> wanted` for every setting in which what is wanted is not what is stored.

    older: what a setting counts as where the file does not have it, because an earlier version
    wrote it; a setting that `older` does not have either counts as None.
    """
    known = {name: stored.get(name, older.get(name)) for name in wanted}
    return [
        f"{name}: {known[name]} -> {value}"
        for name, value in wanted.items()
        if _normal(known[name]) != _normal(value)
    ]


def check_same(
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    older: Mapping[str, Any],
    *,
    what: str,
    remedy: str = "use those, or another --output-dir",
) -> None:
    """Raise ValueError naming the settings in which `what` differs from what is wanted."""
    found = differences(stored, wanted, older)
    if found:
        shown = f"{'; '.join(found[:5])}{' ...' if len(found) > 5 else ''}"
        raise ValueError(f"{what} was made with other settings ({shown}); {remedy}")


def _normal(value: Any) -> Any:
    """Comparable: 15, 15.0 and "15" are one number, as records and command lines write them."""
    value = plain(value)
    if isinstance(value, list):
        return [_normal(item) for item in value]
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    try:
        return str(value) if isinstance(value, bool) else float(value)  # True is not 1
    except (TypeError, ValueError):  # None, or a word
        return str(value)
