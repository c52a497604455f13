"""The one reader of YAML files: values as they are written, errors in one line."""

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from common.files import read_text

MOST_VALUES = 100_000  # aliases of lists of aliases would fill the memory


class _PlainLoader(yaml.SafeLoader):
    """YAML 1.2 as far as it matters: `off` and `24:00:00` stay words, `1e-3` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does, but a key that stands twice is an error and not the last one's value."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# The first letters of a form, by which PyYAML finds it, and the form. What is left out of YAML 1.1,
# such as times, dates and `yes`, stays a word.
_FORMS = {
    "null": (["~", "n", "N", ""], r"~|null|Null|NULL|"),
    "bool": (list("tTfF"), r"true|True|false|False"),
    "int": (list("-+0123456789"), r"[-+]?(?:0|[1-9][0-9]*)"),
    "float": (
        list("-+.0123456789"),
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
    ),
    "merge": (["<"], "<<"),
}
_PlainLoader.yaml_implicit_resolvers = {}
for _tag, (_letters, _form) in _FORMS.items():
    _form_alone = re.compile(f"^(?:{_form})$")
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _form_alone, _letters)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of `key: value` lines. Raises ValueError, in one line, for anything else."""
    content = parse_value(read_text(path), str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold `key: value` lines")
    return {str(key): value for key, value in content.items()}


def parse_value(text: str, what: str) -> Any:
    """What a text stands for as YAML. Raises ValueError that begins with `what`."""
    try:
        # Two steps, of nodes and of values: nodes still tell an alias from what it stands for.
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        if _values_in(node, {}) > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES} values, by its aliases")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{what}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: an integer of a million digits
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{what} is not YAML: {where}{reason}") from None


def _values_in(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many values there are when every alias is written out; infinite for one of itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")  # while its parts are counted: it may be one of them
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    return known[id(node)]


def check_names(given: Collection[str], known: Collection[str], what: str) -> None:
    """Raise ValueError for a name that is not known, with those that are spelled alike."""
    for name in given:
        if name not in known:
            # Any word may be wrong; only one that is spelled nearly right gets a hint.
            near = difflib.get_close_matches(name, known)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{what}: there is no {name!r}{hint}")


def plain(value: Any) -> Any:
    """A value as YAML and JSON know it: paths as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
