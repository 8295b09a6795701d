"""Metrics of generated pictures, on one or several processes; the launchable form of `genkit eval`.

    python eval/fid.py fid REAL FAKE --protocol pytorch-fid --weights pt_inception-2015-12-05-6726825d.pth
    accelerate launch eval/fid.py report REAL --pipeline genkit/enat-lowpoly --prompts prompts.txt --num-samples 5000 --html report.html
    torchrun --nproc_per_node 2 eval/fid.py fid REAL FAKE --device cpu

Several processes print the number of one. The options are those of `genkit eval --help`.
"""

import argparse
import os
import sys

import torch

from genkit.cli import eval as command
from genkit.cli._output import say_error
from genkit.cli.main import describe


def main() -> int:
    """Parse the command line, join the processes, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    command.add_arguments(parser)
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        uses_gpu = args.device != "cpu" and torch.cuda.is_available()
        if uses_gpu and args.device is None:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.distributed.init_process_group("gloo")  # objects, not tensors, are exchanged
    try:
        return command.run(args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        say_error(describe(error))
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if "WORLD_SIZE" in os.environ else sys.exit(code)  # gloo may abort at the interpreter's own exit
