"""Entry point of `genkit`: finds the commands, parses the arguments, turns expected errors into one line."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import genkit
import genkit.cli
from genkit.checks import unknown
from genkit.cli._output import say_error

DESCRIPTION = "Generate, inspect, verify and convert with published generative systems."
NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")  # torchao, where it is installed, on parts of itself
EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def find_commands() -> dict[str, ModuleType]:
    """Return the command modules of `genkit.cli` by name: `genkit.cli.tokenizer_report` is `tokenizer-report`."""
    names = sorted(m.name for m in pkgutil.iter_modules(genkit.cli.__path__) if not m.name.startswith("_") and m.name != "main")
    return {name.replace("_", "-"): importlib.import_module(f"genkit.cli.{name}") for name in names}


def build_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line and the one of each command."""
    parser = argparse.ArgumentParser("genkit", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    slots = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers = {}
    for name, module in find_commands().items():
        command = slots.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
        parsers[name] = command
    return parser, parsers


def refuse_unknown(parser: argparse.ArgumentParser, extra: Sequence[str]) -> NoReturn:
    """End with the parser's error for arguments it does not know, naming the nearest option."""
    options = [word for word in extra if word.startswith("-")]
    if not options:
        parser.error(f"unexpected argument {extra[0]!r}; quote a prompt that has blanks in it.")
    known = set(re.findall(r"--[a-z][a-z-]*", parser.format_help()))
    parser.error(unknown(options[0].split("=")[0], known, "option"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; ends the process with code 2 and a message when it is wrong, with 0 after --help and --version."""
    parser, parsers = build_parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in parsers:
        parser.error(unknown(argv[0], parsers, "command"))
    args, extra = parser.parse_known_args(argv)
    if args.version:
        print(genkit.__version__)
        parser.exit()
    if args.command is None:
        parser.print_help()
        parser.exit()
    if extra:
        refuse_unknown(parsers[args.command], extra)
    return args


def describe(error: BaseException) -> str:
    """Return one line for an error; one that genkit did not raise itself is given with its type and the way to the traceback."""
    text = " ".join(str(error).split()) or type(error).__name__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames and frames[-1].f_globals.get("__name__", "").split(".")[0] == "genkit":
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        Exit code: 0, 1 where a check failed (`verify`, `doctor`), 2 for an error, 130 when interrupted.
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return int(args.run(args))
    except BrokenPipeError:
        # The reader of a pipe has gone (`genkit list | head`): nothing to say, and nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EXPECTED as error:
        if args.debug:
            raise
        say_error(describe(error))
        return 2
    except KeyboardInterrupt:
        say_error("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
