"""How an option of a script is declared: default, former name, and what a resumed run may change.

A script is configured by a frozen dataclass. What people type stays flat (`--learning_rate`), while
the dataclass is composed of groups (`config.optimizer.learning_rate`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, field, fields, replace
from typing import Any, TypeVar

T = TypeVar("T")

FLAT, MAY_CHANGE, FORMER_NAME = "flat", "may_change", "former_name"
FINGERPRINTED = "fingerprinted"


def option(
    default: Any,
    *,
    may_change: bool = False,
    former_name: str | None = None,
    fingerprinted: bool = True,
) -> Any:
    """A field of a configuration; immutable defaults only.

    `may_change`: a resumed run may have another value, since the steps before are the same. An
    option without it identifies the run. `former_name` is refused with a sentence that names the
    new one. `fingerprinted`: an option of data that decides what the samples are.
    """
    metadata = {MAY_CHANGE: may_change, FORMER_NAME: former_name, FINGERPRINTED: fingerprinted}
    return field(default=default, metadata=metadata)


def group(make: Callable[..., Any], **changes: Any) -> Any:
    """A field that holds a dataclass of options, which are flat on the command line and in YAML.

    `changes` are the defaults that differ from the dataclass's own.
    """
    return field(default_factory=lambda: make(**changes), metadata={FLAT: True})


def groups(config: type[Any]) -> list[Field[Any]]:
    """The fields of a configuration that hold groups."""
    return [one for one in fields(config) if one.metadata.get(FLAT)]


def flat_fields(config: type[Any]) -> Iterator[Field[Any]]:
    """Every option of a configuration, those of its groups among them."""
    for one in fields(config):
        if one.metadata.get(FLAT):
            yield from fields(one.default_factory())  # pyright: ignore[reportCallIssue] # set
        else:
            yield one


def compose(config: type[T], values: Mapping[str, Any]) -> T:
    """A configuration from flat values; what is not among them has its default."""
    values = dict(values)
    for one in groups(config):
        default = one.default_factory()  # pyright: ignore[reportCallIssue] # a group has one
        names = [member.name for member in fields(default) if member.name in values]
        values |= {one.name: replace(default, **{name: values.pop(name) for name in names})}
    return config(**values)


def changeable(config: type[Any]) -> frozenset[str]:
    """The names of the options that a resumed run may change."""
    return frozenset(one.name for one in flat_fields(config) if one.metadata.get(MAY_CHANGE))


def fingerprinted(config: type[Any]) -> list[str]:
    """The names of the options that decide what the samples are, in their order."""
    return [one.name for one in flat_fields(config) if one.metadata.get(FINGERPRINTED, True)]


def former_names(config: type[Any]) -> dict[str, str]:
    """Former name -> name of each option that was renamed."""
    renamed = ((one.metadata.get(FORMER_NAME), one.name) for one in flat_fields(config))
    return {former: name for former, name in renamed if former is not None}
