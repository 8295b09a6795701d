"""`genkit convert`: an official checkpoint to a genkit model folder."""

from __future__ import annotations

import argparse
import pkgutil
from pathlib import Path
from typing import Any

from genkit.checks import choose
from genkit.cli._output import add_json, print_json
from genkit.paths import PACKAGE

HELP = "convert an official checkpoint to a genkit model folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("system", metavar="SYSTEM", help=f"whose layout the checkpoint has: {', '.join(systems())}")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file or folder as its authors published it")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write: config.json and safetensors")
    add_option(parser)
    add_json(parser)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--option` to a command that reads official checkpoints."""
    told = "what an official file does not tell, such as enc_dec=22,2; may be repeated"
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=told)


def systems() -> list[str]:
    """Return the systems that have a converter, without importing one."""
    names = [module.name for module in pkgutil.iter_modules([str(PACKAGE / "convert")])]
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def parse_option(text: str) -> tuple[str, Any]:
    """Parse `key=value`: numbers and comma lists of numbers become such, `true` and `false` booleans, the rest stays text.

    Raises:
        ValueError: if there is no key or no `=`.
    """
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise ValueError(f"--option must be KEY=VALUE, such as enc_dec=22,2, got {text!r}.")
    parts = [parse_value(part.strip()) for part in value.split(",")]
    return key, tuple(parts) if len(parts) > 1 else parts[0]


def parse_value(text: str) -> int | float | bool | str:
    """Return a word as the number or boolean that it spells, else as it is."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run(args: argparse.Namespace) -> int:
    """Convert, and tell what was mapped and what was dropped for which reason."""
    choose(args.system, systems(), "system")
    options = dict(parse_option(text) for text in args.option)
    if not args.checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint at {str(args.checkpoint)!r}.")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise FileExistsError(f"{str(args.out)!r} exists and is not an empty folder; choose another name.")

    from genkit import convert

    report = convert.convert(args.system, args.checkpoint, args.out, **options)
    if args.json:
        print_json({"system": report.system, "out": str(args.out), "mapped": report.mapped, "dropped": report.dropped})
    else:
        print(report)
        print(f"wrote {args.out}")
    return 0
