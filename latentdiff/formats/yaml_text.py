"""YAML as people mean it: no key is there twice, and `no` is a word.

PyYAML takes the last of two equal keys and says nothing, and follows YAML 1.1, in which no, off,
yes and on are true or false and 1e-3 is a text.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

REPLACED = ("bool", "float", "timestamp")  # a date is a text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, with the booleans and numbers of YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in PyYAML
        letter: [pair for pair in pairs if pair[0].rpartition(":")[2] not in REPLACED]
        for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """What a configuration says; ValueError for a key twice, yaml.YAMLError for no YAML."""
    check_keys(text)
    return _Loader(text).get_single_data()


def check_keys(text: str | bytes) -> None:
    """Raise ValueError, with both lines, for a key that is there twice.

    Raises yaml.YAMLError for what is no YAML.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for mapping in _mappings(root):
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
            word, line = (key.tag, key.value), key.start_mark.line + 1
            if word in lines:
                raise ValueError(
                    f"the key {key.value!r} is there twice, in lines {lines[word]} and {line}; "
                    "keep one of them"
                )
            lines[word] = line


def _mappings(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Every mapping once: an alias is the node that it names."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
