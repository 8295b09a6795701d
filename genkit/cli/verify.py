"""`genkit verify`: recompute golden cases, or a packaged model's certificate, and compare with the stored tensors."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path

from genkit.cli._models import find_local
from genkit.cli._output import add_json

HELP = "recompute stored numbers on this machine: golden cases, or a packaged model's certificate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", nargs="?", help="packaged model, or folder, whose certificate to check, such as genkit/enat-lowpoly")
    parser.add_argument("--cases", type=Path, nargs="+", metavar="DIR", help="run every golden case below these folders")
    parser.add_argument("--only", metavar="GLOB", help="of the cases, only those whose name or kind fits, such as 'enat/*'")
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="OUT", help="write the computed tensors as OUT/<system>/<case>.safetensors")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check what is asked for; 1 if a number is outside its tolerance."""
    if (args.model is None) == (args.cases is None):
        raise ValueError("verify takes either a packaged model or --cases DIR: genkit verify genkit/enat-lowpoly.")
    if args.model is not None:
        if args.only is not None or args.save is not None:
            raise ValueError("--only and --save go with --cases; a model's certificate is one case and saves nothing.")
        find_local(args.model)
    for folder in args.cases or ():
        if not folder.is_dir():
            raise FileNotFoundError(f"case folder {str(folder)!r} does not exist; give a folder that holds <system>/<case>/config.json.")
    return verify_model(args) if args.model is not None else verify_cases(args)


def verify_model(args: argparse.Namespace) -> int:
    """Check a model's certificate."""
    import torch

    from genkit.cli._models import pick_device
    from genkit.parity import certificate

    return certificate.verify(args.model, pick_device(args.device), getattr(torch, args.dtype), args.json)


def verify_cases(args: argparse.Namespace) -> int:
    """Run the golden cases below the folders."""
    import torch

    from genkit.cli._models import pick_device
    from genkit.parity import base

    device, dtype = torch.device(pick_device(args.device)), getattr(torch, args.dtype)
    cases = [base.Case(path.resolve(), device, dtype) for root in args.cases for path in base.discover(root)]
    if args.only is not None:
        cases = [case for case in cases if fnmatch(case.name, args.only) or fnmatch(case.kind, args.only)]
        if not cases:
            raise ValueError(f"no case below {', '.join(map(str, args.cases))} has a name or kind that fits --only {args.only!r}.")
    return base.report((base.check_case(case, args.save) for case in cases), args.json)
