"""Line charts as SVG files: what the evaluations draw."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#555555", "#008b8b", "#a0527d", "#e8871e", "#5b5bd6")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 190, 24, 48


def ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Return round numbers of an axis."""
    if is_log:
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        return [m * 10.0**p for p in powers for m in (1, 2, 5) if low * 0.999 <= m * 10.0**p <= high * 1.001]
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 8)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_chart(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float, str]]],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = True,
) -> None:
    """Write a chart.

    Args:
        path: SVG file.
        lines: name -> points (x, y, label beside the point).
        x_label, y_label: of the axes.
        log_x: whether x is logarithmic.
    """
    points = [point for line in lines.values() for point in line]
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    low_x, high_x = (
        (min(xs) / 1.15, max(xs) * 1.15) if log_x else (min(xs) - 0.05 * (max(xs) - min(xs)), max(xs) + 0.05 * (max(xs) - min(xs)))
    )
    margin = 0.08 * (max(ys) - min(ys) or 1)
    low_y, high_y = min(ys) - margin, max(ys) + margin
    inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def px(x: float) -> float:
        share = math.log(x / low_x) / math.log(high_x / low_x) if log_x else (x - low_x) / (high_x - low_x)
        return LEFT + share * inner_w

    def py(y: float) -> float:
        return TOP + (high_y - y) / (high_y - low_y) * inner_h

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    for x in ticks(low_x, high_x, log_x):
        parts.append(f'<line x1="{px(x):.1f}" y1="{TOP}" x2="{px(x):.1f}" y2="{TOP + inner_h}" stroke="#ddd"/>')
        parts.append(f'<text x="{px(x):.1f}" y="{TOP + inner_h + 16}" text-anchor="middle">{x:g}</text>')
    for y in ticks(low_y, high_y, False):
        parts.append(f'<line x1="{LEFT}" y1="{py(y):.1f}" x2="{LEFT + inner_w}" y2="{py(y):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        corners = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in line)
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, label in line:
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{colour}"/>')
            parts.append(f'<text x="{px(x) + 6:.1f}" y="{py(y) - 6:.1f}" font-size="10" fill="{colour}">{escape(label)}</text>')
        parts.append(f'<rect x="{LEFT + inner_w + 14}" y="{TOP + 20 * i}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + inner_w + 32}" y="{TOP + 20 * i + 11}">{escape(name)}</text>')
    parts.append(f'<text x="{LEFT + inner_w / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = TOP + inner_h / 2
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text></svg>')
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
