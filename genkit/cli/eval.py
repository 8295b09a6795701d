"""`genkit eval`: metrics of generated pictures by the protocols of the published tools, reports, statistics files, explanations."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.checks import choose
from genkit.cli._eval_others import OTHERS, add_other_arguments, read_prompts, run_other
from genkit.cli._output import add_json, numbers, positive, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from genkit.eval.metrics import Result
    from genkit.eval.pictures import Source
    from genkit.eval.protocols import Protocol

HELP = "measure pictures, reconstructions, clips and meshes: fid, kid, ..., report, statistics, explain, protocols"

METRICS = ("fid", "fid-infinity", "sfid", "is", "kid", "precision-recall", "density-coverage", "memorisation", "vendi")
WITHOUT_REAL = ("is", "vendi")
ACTIONS = (*METRICS, "report", "statistics", "explain", "protocols", *OTHERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("action", metavar="ACTION", help=f"a metric ({', '.join(METRICS)}), {', '.join(OTHERS)}, report, statistics, explain, protocols")
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="REAL FAKE (is, vendi, clip-score: FAKE); statistics: SOURCE OUT.npz; explain: A.json B.json",
    )
    add("--protocol", help="whose choices to make, see `genkit eval protocols` (default: torch-fidelity)")
    add("--weights", type=Path, metavar="FILE", help="the FID Inception network's checkpoint (default: fetched once, checksum verified)")
    add("--network", help="efficientnet-lite0: the packaged network instead of Inception; its distance is not FID")
    add("--size", type=positive, metavar="PIXELS", help="another input size of the network than the protocol's")
    add("--pipeline", metavar="MODEL", help="evaluate what a pipeline makes instead of FAKE, such as genkit/enat-lowpoly")
    add("--num-samples", type=positive, default=5000, metavar="N", help="pictures the pipeline makes (default: %(default)s)")
    add("--prompts", type=Path, metavar="FILE", help="prompts of the pipeline, one per line; picture i takes prompt i modulo their number")
    add("--seed", type=int, default=0, help="seed of the pipeline's first picture (default: %(default)s)")
    add("--steps", type=positive, metavar="N", help="sampling steps of the pipeline (default: the model's)")
    add("--background", help="colour behind transparent pictures: white, black, or drop to ignore transparency (default: refuse them)")
    add("--skip-bad", action="store_true", help="leave out pictures that cannot be used; they are counted in the result")
    add("--split", default="train", help="split of a hub data set or a folder of parquet files (default: %(default)s)")
    add("--view-size", type=positive, default=64, metavar="PIXELS", help="side of turntable views (default: %(default)s)")
    add("--views", type=numbers, metavar="N,N", help="which of a turntable's views are the real pictures, 0 the front (default: all)")
    add("--batch-size", type=positive, default=32, metavar="N", help="pictures at a time (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes that decode pictures (default: by the machine)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add("--cache", metavar="DIR", help="folder of the feature cache; '' for none (default: the user's cache folder)")
    add("--no-ci", action="store_true", help="no confidence intervals: faster")
    add_other_arguments(parser)
    add("--html", type=Path, metavar="FILE", help="report: also write a page with pictures, neighbours, classes and a plot")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Do what is asked for."""
    choose(args.action, ACTIONS, "evaluation")
    if args.action == "protocols":
        return show_protocols(args)
    if args.action == "explain":
        return explain(args)
    if args.action == "statistics":
        return write_statistics(args)
    if args.action in OTHERS:
        return run_other(args)
    return measure(args)


def _expect(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Return the inputs if there are as many as named.

    Raises:
        ValueError: naming what is missing or too much.
    """
    if len(args.inputs) != len(names):
        wanted = " ".join(names) or "no input"
        raise ValueError(f"genkit eval {args.action} takes {wanted}, got {len(args.inputs)}: {' '.join(args.inputs) or 'nothing'}.")
    return list(args.inputs)


def show_protocols(args: argparse.Namespace) -> int:
    """List the protocols and their choices."""
    from dataclasses import asdict

    from genkit.eval.protocols import PROTOCOLS

    _expect(args, ())
    if args.json:
        print_json([asdict(protocol) for protocol in PROTOCOLS.values()])
        return 0
    columns = ("name", "network", "size", "resize", "value_range", "quantize", "ddof", "score", "kid", "reference")
    print_table(columns, [[str(getattr(protocol, column)) for column in columns] for protocol in PROTOCOLS.values()])
    return 0


def explain(args: argparse.Namespace) -> int:
    """Say which choices make two results differ."""
    from genkit.eval.protocols import explain as differences

    first, second = (_read_result(Path(path)) for path in _expect(args, ("A.json", "B.json")))
    lines = differences(first, second)
    if args.json:
        print_json(lines)
        return 0
    print(f"{first['metric']} {first['value']:.6g} against {second['metric']} {second['value']:.6g}")
    print("\n".join(lines) or "No choice differs: the numbers differ by their samples alone.")
    return 0


def _read_result(path: Path) -> dict[str, Any]:
    """Read what `--json` printed; of a report the first metric."""
    if not path.is_file():
        raise FileNotFoundError(f"result file {str(path)!r} does not exist; write one with `genkit eval fid REAL FAKE --json > FILE`.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}).") from error
    content = content[0] if isinstance(content, list) and content else content
    if not isinstance(content, dict) or not {"metric", "value", "protocol"} <= content.keys():
        raise ValueError(f"{str(path)!r} is no result of `genkit eval ... --json`: it lacks metric, value or protocol.")
    return content


def protocol_of(args: argparse.Namespace) -> Protocol:
    """Return the protocol with the command line's changes."""
    from genkit.eval.protocols import PROTOCOLS, get_protocol

    if args.network is not None:
        if args.protocol not in (None, "lite0"):
            raise ValueError(f"--network {args.network} has choices of its own; leave out --protocol {args.protocol}.")
        lite = PROTOCOLS["lite0"]
        choose(args.network, (lite.network,), "network")
        return lite.change(size=args.size)
    return get_protocol(args.protocol or "torch-fidelity", size=args.size)


def open_fake(args: argparse.Namespace, path: str | None, protocol: Protocol) -> Source:
    """Open the generated pictures: a path, or a pipeline that makes them."""
    from genkit.cli._models import check_model, pick_device
    from genkit.eval.pictures import PipelineSource, open_source

    if path is not None:
        return open_source(path, background=args.background, split=args.split, view_size=args.view_size)
    check_model(args.pipeline)
    prompts = None
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    from genkit.pipelines.base import GenPipeline

    pipe = GenPipeline.from_pretrained(args.pipeline, device=pick_device(args.device))
    pipe.set_progress_bar_config(disable=True)
    options = {} if args.steps is None else {"num_inference_steps": args.steps}
    return PipelineSource(pipe, args.pipeline, args.num_samples, prompts, args.seed, options, protocol.quantize)


def measure(args: argparse.Namespace) -> int:
    """Compute one metric, or all of a report."""
    names: tuple[str, ...] = ("FAKE",) if args.action in WITHOUT_REAL else ("REAL", "FAKE")
    if args.pipeline is not None:
        names = names[:-1]
    paths = _expect(args, names)
    if args.html is not None and args.action != "report":
        raise ValueError("--html goes with `genkit eval report`.")
    if args.html is not None and not args.html.absolute().parent.is_dir():
        raise FileNotFoundError(f"--html: there is no folder {str(args.html.absolute().parent)!r}; make it first.")
    from genkit.eval.evaluate import evaluate
    from genkit.eval.metrics import METRICS as KNOWN
    from genkit.eval.metrics import REPORT
    from genkit.eval.pictures import open_source
    from genkit.eval.statistics_files import is_statistics

    protocol = protocol_of(args)
    metrics: tuple[str, ...] = (args.action,)
    real: Source | str | None = None
    if args.action not in WITHOUT_REAL:
        real = paths[0]
        if not is_statistics(real):
            real = open_source(real, background=args.background, split=args.split, view_size=args.view_size, views=args.views)
    if args.action == "report":
        metrics = tuple(name for name in REPORT if protocol.is_fid or not KNOWN[name].needs_inception)
        if isinstance(real, str):
            metrics = tuple(name for name in metrics if name in ("fid", "sfid", "is", "vendi"))
    fake = open_fake(args, paths[-1] if args.pipeline is None else None, protocol)
    with progress_bar(not args.json, "features") as progress:
        found = evaluate(metrics, fake, real, protocol, progress=progress, **_options(args))
    if _is_first():
        report(args, found.results)
        if args.html is not None:
            from genkit.eval.html import write_html

            args.html.write_text(write_html(found), encoding="utf-8")
            print(f"wrote {args.html}", file=sys.stderr)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    from genkit.cli._models import pick_device

    return {
        "weights": args.weights, "device": pick_device(args.device), "batch_size": args.batch_size, "workers": args.workers,
        "skip_bad": args.skip_bad, "cache": args.cache, "intervals": not args.no_ci,
    }  # fmt: skip


def _is_first() -> bool:
    """Tell whether this is the first of the processes of a launch."""
    import torch

    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or torch.distributed.get_rank() == 0


def report(args: argparse.Namespace, results: list[Result]) -> None:
    """Print results: one JSON object for a single metric, a list for several, or lines for people."""
    if args.json:
        found = [result.to_dict() for result in results]
        print_json(found[0] if len(found) == 1 else found)
        return
    for result in results:
        print(result)
        for warning in result.warnings:
            print(f"  note: {warning}")


def write_statistics(args: argparse.Namespace) -> int:
    """Write mean and covariance of a source's features, to be used as REAL later and by other tools."""
    source, out = _expect(args, ("SOURCE", "OUT.npz"))
    if not out.endswith(".npz"):
        raise ValueError(f"genkit eval statistics: the output must end in .npz, got {out!r}.")
    from genkit.eval.extract import Extractor, extract
    from genkit.eval.metrics import statistics_of
    from genkit.eval.pictures import open_source

    protocol, options = protocol_of(args), _options(args)
    pictures = open_source(source, background=args.background, split=args.split, view_size=args.view_size, views=args.views)
    extractor = Extractor(protocol, options.pop("weights"), options.pop("device"))
    options.pop("intervals")
    with progress_bar(not args.json, "features") as progress:
        features = extract(pictures, extractor, [protocol.tap], progress=progress, **options)
    stats = statistics_of(features, protocol.tap)
    if _is_first():
        stats.save(out, protocol=protocol.name, data=pictures.fingerprint())
        print_json({"statistics": out, "count": stats.count}) if args.json else print(f"{out}: {stats.count} pictures, {stats.source}")
    return 0
