"""How an option of a script is declared: default, former name, what it needs to have an effect.

A script is configured by a frozen dataclass. What people type stays flat (`--learning_rate`), while
the dataclass is composed of groups (`config.optimizer.learning_rate`).
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import Field, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

FLAT, MAY_CHANGE, FORMER_NAME = "flat", "may_change", "former_name"
FINGERPRINTED, NEEDS = "fingerprinted", "needs"


def option(
    default: Any,
    *,
    may_change: bool = False,
    former_name: str | None = None,
    fingerprinted: bool = True,
    needs: str | None = None,
) -> Any:
    """A field of a configuration; immutable defaults only.

    `may_change`: a resumed run may have another value, since the steps before are the same. An
    option without it identifies the run. `former_name` is refused with a sentence that names the
    new one. `fingerprinted`: an option of data that decides what the samples are. `needs`: without
    what it has no effect, such as "optimizer=muon", or "stream" for an option that must be on;
    alternatives are joined by " or ", what must hold together by " and ". A script's own conditions
    are in `NEEDS` of its class, where "" is for an option that the script does not use. See
    `check_effects`.
    """
    metadata = {
        **{MAY_CHANGE: may_change, FORMER_NAME: former_name},
        **{FINGERPRINTED: fingerprinted, NEEDS: needs},
    }
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


def value_of(config: Any, name: str) -> Any:
    """The value of an option by its flat name, or by a path such as `unet.layers_per_block`.

    None for a path into a part that is not given.
    """
    first, *inner = name.split(".")
    for one in groups(type(config)):
        if hasattr(member := getattr(config, one.name), first):
            config = member
            break
    value = getattr(config, first)
    for part in inner:
        value = None if value is None else getattr(value, part)
    return value


def check_effects(config: Any, typed: Collection[str]) -> None:
    """Raise ValueError for an option that is given although it has no effect beside the others.

    Given are those of the command line, `typed`, and in a file those whose value is not the
    default: a file that --print_config wrote, or a run, has all of them.
    """
    for name, needs in idle_options(config):
        if _is_given(config, name, typed):
            unmet = [one for one in _conditions(needs) if not _holds(config, one)]
            names = dict.fromkeys(one.partition("=")[0] for one in unmet)
            beside = ", ".join(_shown(config, one) for one in names)
            beside = f"with {beside}" if beside else "in this script"
            raise ValueError(f"{_shown(config, name)} has no effect {beside}; leave it out")


def idle_options(config: Any) -> list[tuple[str, str]]:
    """The options that have no effect beside the others, each with what it needs."""
    declared = {one.name: one.metadata.get(NEEDS) for one in flat_fields(type(config))}
    conditions = (*getattr(config, "NEEDS", {}).items(), *declared.items())
    return [
        (name, needs)
        for name, needs in conditions
        if needs is not None and not _is_met(config, needs)
    ]


def check_utf8(arguments: Iterable[str]) -> None:
    """Raise ValueError, naming it, for an argument of the command line that is no UTF-8."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the argument {argument!r} is not valid UTF-8, in which files and records are "
                "written; write it, or name the file, in UTF-8"
            ) from error


def expanded(value: Any) -> Any:
    """A path, or a text that begins as one, with the user's home in place of `~`."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # Path.expanduser raises where nobody is so called
    is_path = isinstance(value, str) and value.startswith("~/")
    return os.path.expanduser(value) if is_path else value


def _is_given(config: Any, name: str, typed: Collection[str]) -> bool:
    parent, _, last = name.rpartition(".")
    if parent:
        part = value_of(config, parent)
        if part is None:
            return False
        default = next(one.default for one in fields(part) if one.name == last)
    else:
        default = value_of(type(config)(), name)
    if any(one == name or one.startswith(f"{name}.") for one in typed):
        return True
    value = value_of(config, name)  # a list of YAML is as good as a tuple
    return (list(value) if isinstance(value, tuple | list) else value) != (
        list(default) if isinstance(default, tuple | list) else default
    )


def _is_met(config: Any, needs: str) -> bool:
    """Whether one of the alternatives holds: options that are on, or have the named values."""
    alternatives = filter(None, needs.split(" or "))
    return any(all(_holds(config, one) for one in _conditions(each)) for each in alternatives)


def _conditions(needs: str) -> list[str]:
    return [one for each in needs.split(" or ") for one in each.split(" and ") if one]


def _holds(config: Any, condition: str) -> bool:
    name, wants, wanted = condition.partition("=")
    value = value_of(config, name)
    return _word(value) == wanted if wants else bool(value)


def _shown(config: Any, name: str) -> str:
    value = value_of(config, name)
    return name if is_dataclass(value) else f"{name}={_word(value)}"


def _word(value: Any) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
