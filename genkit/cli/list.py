"""`genkit list`: the packaged models, and the official ones that can be loaded or converted."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from genkit.catalogue import list_models
from genkit.cli._output import add_json, bytes_text, print_json, print_table

HELP = "list the packaged models and the official ones genkit can load"

TITLES = {"packaged": "In the package, offline", "official": "Official checkpoints, read by genkit convert and GenPipeline.from_pretrained"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--packaged", action="store_true", help="only the models inside the package")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the models."""
    models = list_models(official=not args.packaged)
    if args.json:
        print_json([asdict(model) for model in models])
        return 0
    columns = ("name", "what", "parameters", "size", "memory", "licence", "source")
    for kind, title in TITLES.items():
        rows = [
            (
                model.name,
                model.summary,
                f"{model.parameters / 1e6:,.1f} M" if model.parameters else "",
                bytes_text(model.size_mb * 1e6) if model.size_mb else "",
                bytes_text(model.memory_mb * 1e6) if model.memory_mb else "",
                model.licence,
                "" if kind == "packaged" else model.source,
            )
            for model in models
            if model.kind == kind
        ]
        if rows:
            print_table(columns, rows, title=title)
            print()
    return 0
