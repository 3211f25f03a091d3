"""``docs/reference/cli.md``: the command line, from its parsers."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from memshare.cli.main import COMMANDS, load
from memshare.lab.markdown import table

INTRODUCTION = """\
# Command line

`memshare COMMAND --help` prints the same. Exit status: 0 done, 1 an error that says what to do, 2 a
wrong command line, 130 interrupted. `memshare check` gives 1 for "will not work".
"""


def render() -> str:
    """The whole page."""
    overview = table(
        ["command", "what"], ([f"[`{n}`](#memshare-{n})", h] for n, (_, h) in COMMANDS.items())
    )
    return (
        "\n".join([INTRODUCTION, overview, *(_command(name) for name in COMMANDS)]).rstrip() + "\n"
    )


def _command(name: str) -> str:
    parser = argparse.ArgumentParser(prog=f"memshare {name}")
    load(name).add_arguments(parser)
    return f"\n## {parser.prog}\n\n{_parser(parser, COMMANDS[name][1])}"


def _parser(parser: argparse.ArgumentParser, summary: str) -> str:
    text = _prose(parser.description or "") or f"{summary[0].upper()}{summary[1:]}."
    options, commands = [], []
    for action in parser._actions:  # argparse has no public list of them
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands += [
                f"\n### {sub.prog}\n\n{_parser(sub, helps[name])}"
                for name, sub in action.choices.items()
            ]
        elif not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS:
            options.append([_names(action), _default(action), _help(parser, action)])
    heads = ["argument", "default", "meaning"]
    parts = [text, table(heads, options)] if options else [text]
    return "\n\n".join(parts) + "\n" + "".join(commands)


def _names(action: argparse.Action) -> str:
    values = ""
    if action.choices is not None:
        values = "{" + ",".join(map(str, action.choices)) + "}"
    elif action.nargs != 0:
        values = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    return ", ".join(f"`{name} {values}`".replace(" `", "`") for name in action.option_strings)


def _default(action: argparse.Action) -> str:
    value: Any = action.default
    if action.required:
        return "required"
    if value in (None, "", [], argparse.SUPPRESS):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    return _prose(formatter._expand_help(action) if action.help else "").replace("\n", " ")


def _prose(text: str) -> str:
    """A docstring of ours as Markdown on one line a paragraph; ``|`` would end a cell."""
    paragraphs = inspect.cleandoc(text).replace("``", "`").replace("|", "\\|").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
