"""Encode prompts once, so that text-to-image distillation needs no text encoder in memory.

    python distill/encode.py --teacher PixArt-alpha/PixArt-XL-2-512x512 --prompts prompts.txt --out captions.safetensors

The file then stands for `task_config.data`.
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli

from genkit.distill.families import family_of, open_teacher
from genkit.tasks._conditions import write_conditions
from genkit.tasks.distill import read_lines


def main(teacher: str, prompts: Path, out: Path, batch_size: int = 32, device: str = "cpu") -> None:
    """Write the conditions of prompts.

    Args:
        teacher: pipeline whose encoders to use.
        prompts: text file, one prompt per line.
        out: file to write, .safetensors.
        batch_size: prompts at a time.
        device: where to encode.
    """
    lines, family = read_lines(str(prompts)), family_of(open_teacher(teacher).to(device))
    parts = [family.conditions(lines[start : start + batch_size]) for start in range(0, len(lines), batch_size)]
    rows = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    empty = family.null({name: value[:1] for name, value in rows.items()})
    write_conditions(out, rows, empty)
    print(f"wrote {out}: {len(lines)} prompts, {', '.join(f'{name} {list(value.shape)}' for name, value in rows.items())}")


if __name__ == "__main__":
    auto_cli(main)
