"""`latentdiff completion`: a script that lets a shell complete commands, options and files."""

import argparse

SHELLS = ("bash", "zsh", "fish")
FILES = ("source", "model", "lora", "tokenizer", "config")  # which may be names too


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its argument."""
    parser = commands.add_parser(
        "completion",
        help="let your shell complete",
        epilog='examples: eval "$(latentdiff completion bash)" in ~/.bashrc, the same with zsh '
        "after compinit in ~/.zshrc; latentdiff completion fish | source in config.fish",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_completion, parser=parser)
    parser.add_argument("shell", choices=SHELLS, help="prints the script of this shell")


def _completion(arguments: argparse.Namespace) -> None:
    import shtab

    from latentdiff.cli import command_tree
    from latentdiff.cli.generate import SAMPLERS

    parser = command_tree()
    for one in _parsers(parser):
        for action in one._actions:
            path = getattr(action.type, "__name__", "") == "Path"
            if path or (action.dest in FILES and action.nargs != 0):
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue] # its way
            elif "--sampler" in action.option_strings:
                action.choices = SAMPLERS  # others are allowed, and not completed
            elif action.dest == "prompt":  # zsh would show the word's help in place of completing
                action.complete = {"zsh": "{:}"}  # pyright: ignore[reportAttributeAccessIssue] # its way
    print(shtab.complete(parser, shell=arguments.shell))


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in dict.fromkeys(action.choices.values()):
                found += _parsers(one)
    return found
