"""YAML in which no mapping has a key twice: PyYAML would take the last and say nothing."""

from collections.abc import Iterator

import yaml


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
