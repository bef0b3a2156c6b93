"""`--help` of a command with many options: those that matter first, and the others by group."""

import argparse
from collections.abc import Sequence
from typing import Any


class Help(argparse.Action):
    """`--help` shows the options `first`, `--help GROUP` those of a group, `--help all` all.

    A group's name is what its title has before the colon; options are named too, or a word of
    theirs.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, first: Sequence[str], default: str
    ) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=default, nargs="?")
        self.metavar, self.help, self.first = "GROUP", "an option, those of a group, or all", first

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print the help and end the program."""
        titled = {
            str(group.title).partition(":")[0]: group
            for group in parser._action_groups
            if ":" in str(group.title)
        }
        if values == "all":
            parser.print_help()
            parser.exit()
        formatter = parser._get_formatter()
        if values is None:
            formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
            shown = [one for one in parser._actions if one.dest in self.first]
            formatter.start_section("the options that matter first")
            formatter.add_arguments(sorted(shown, key=lambda one: self.first.index(one.dest)))
            formatter.end_section()
            formatter.start_section("other options: --help GROUP, or --help all")
            formatter.add_text("\n".join(str(group.title) for group in titled.values()))
            formatter.end_section()
            formatter.add_text(parser.epilog)
        elif values in titled:
            formatter.start_section(titled[values].title)
            formatter.add_arguments(titled[values]._group_actions)
            formatter.end_section()
        elif named := _named(values, parser):
            formatter.add_arguments(named)
        else:
            parser.error(
                f"--help {values}: there is no such group or option; the groups are "
                f"{', '.join(titled)}, and all"
            )
        print(formatter.format_help(), end="")
        parser.exit()


def _named(word: str, parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The option of that name, or those of whose name it is a word; none of another."""
    names = {one: one.dest for one in parser._actions if one.help != argparse.SUPPRESS}
    word = word.strip("-").lower()
    exact = [one for one, name in names.items() if word == name]
    return exact or [one for one, name in names.items() if word in name.split("_")]
