"""An evaluation as one HTML file that needs nothing else: numbers, pictures, nearest neighbours, classes, precision against recall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from genkit.eval.evaluate import Evaluation
from genkit.eval.manifold import manifold_scores, nearest_neighbours
from genkit.eval.metrics import MOST_NEIGHBOURS, Result
from genkit.eval.page import escape, image, page, section
from genkit.eval.pictures import Picture, PictureError, Source

GRID, NEIGHBOURS, CURVE = 64, 24, (1, 2, 3, 5, 7, 10)


def write_html(evaluation: Evaluation) -> str:
    """Return the report as a page."""
    data = evaluation.data
    parts = [f"<h1>{escape(data.fake.source)}</h1>", _numbers(evaluation.results)]
    parts.append(section("Generated", _grid(evaluation.fake)))
    if evaluation.real is not None and data.real is not None:
        parts.append(section("Real", _grid(evaluation.real)))
        if data.protocol.tap in data.fake.arrays and data.protocol.tap in data.real.arrays:
            parts += [_neighbours(evaluation), _classes(evaluation), _curve(evaluation)]
    return page(f"Evaluation of {data.fake.source}", parts)


def _numbers(results: Sequence[Result]) -> str:
    rows = []
    for r in results:
        interval = f"{r.ci[0]:.5g} to {r.ci[1]:.5g}" if r.ci else ""
        notes = "<br>".join(f"<span class='warn'>{escape(warning)}</span>" for warning in r.warnings)
        rows.append(
            f"<tr><td>{escape(r.metric)}</td><td class='n'>{r.value:.6g}</td><td class='n'>{interval}</td>"
            f"<td class='n'>{r.num_real or ''}</td><td class='n'>{r.num_fake}</td><td>{notes}</td></tr>"
        )
    head = "<tr><th>metric</th><th>value</th><th>95 % interval</th><th>real</th><th>generated</th><th>remarks</th></tr>"
    p = results[0].protocol
    choices = ", ".join(f"{key} {escape(getattr(p, key))}" for key in ("network", "resize", "size", "value_range", "tap", "ddof"))
    return f"<p>Protocol <b>{escape(p.name)}</b>: {choices}; weights {escape(results[0].weights)}.</p><table>{head}{''.join(rows)}</table>"


def _image(picture: Picture) -> str:
    return image(picture.pixels, picture.label or picture.name)


def _read(source: Source, names: Sequence[int]) -> list[Picture]:
    """Read pictures, leaving out those that cannot be used."""
    found = []
    for index in names:
        try:
            found.append(source.read(index))
        except PictureError:
            continue
    return found


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` indices spread over 0 .. count - 1."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def _grid(source: Source) -> str:
    pictures = _read(source, _spread(len(source), GRID))
    return f"<div class='grid'>{''.join(map(_image, pictures))}</div>"


def _neighbours(evaluation: Evaluation) -> str:
    """Show the generated pictures that are nearest to a real one: copies come first."""
    data = evaluation.data
    assert data.real is not None
    assert evaluation.real is not None
    if data.fake.left_out or data.real.left_out:
        return ""  # rows and pictures would not belong together
    real, fake = (features.tensor(data.protocol.tap)[:MOST_NEIGHBOURS] for features in (data.real, data.fake))
    distances, found = nearest_neighbours(real, fake)
    order = distances.argsort()[:NEIGHBOURS].tolist()
    pairs = []
    for i in order:
        pair = _read(evaluation.fake, [i]) + _read(evaluation.real, [int(found[i])])
        pairs.append(f"<div class='pair'>{''.join(map(_image, pair))}<br>{distances[i]:.3g}</div>")
    text = (
        f"<p>The {len(order)} generated pictures (left) nearest to a real one (right), by distance of features. Copies have distance 0.</p>"
    )
    return section("Nearest neighbours", text + "".join(pairs))


def _classes(evaluation: Evaluation) -> str:
    """Compare classes that both sides name: how many, and how far a generated picture is from the nearest real one of its class."""
    data = evaluation.data
    assert data.real is not None
    real_counts, fake_counts = Counter(data.real.labels), Counter(data.fake.labels)
    shared = sorted((real_counts.keys() & fake_counts.keys()) - {""})
    if not shared:
        return ""
    real, fake = (features.tensor(data.protocol.tap) for features in (data.real, data.fake))
    rows = []
    for label in shared[:200]:
        own_real = torch.tensor([name == label for name in data.real.labels])
        own_fake = torch.tensor([name == label for name in data.fake.labels])
        distance = nearest_neighbours(real[own_real], fake[own_fake])[0].mean()
        counts = f"<td class='n'>{real_counts[label]}</td><td class='n'>{fake_counts[label]}</td>"
        rows.append(f"<tr><td>{escape(label)}</td>{counts}<td class='n'>{distance:.4g}</td></tr>")
    head = "<tr><th>class</th><th>real</th><th>generated</th><th>mean distance to the nearest real of the class</th></tr>"
    more = f"<p>{len(shared) - 200} more classes.</p>" if len(shared) > 200 else ""
    return section("Classes", f"<table>{head}{''.join(rows)}</table>{more}")


def _curve(evaluation: Evaluation) -> str:
    """Plot precision against recall for several k."""
    data = evaluation.data
    assert data.real is not None
    real, fake = (features.tensor(data.protocol.tap)[:MOST_NEIGHBOURS] for features in (data.real, data.fake))
    usable = [k for k in CURVE if k < min(len(real), len(fake))]
    scores = [(k, manifold_scores(real, fake, k, border=data.protocol.border)) for k in usable]
    size, margin = 320, 40

    def place(x: float, y: float) -> tuple[float, float]:
        return margin + x * (size - 2 * margin), size - margin - y * (size - 2 * margin)

    points = [(*place(s.recall, s.precision), k) for k, s in scores]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    dots = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3'/>" for x, y, _ in points)
    free: tuple[float, float] | None = None  # where the last name stands: names nearer than 30 pixels would overlap
    for x, y, k in reversed(points):
        if free is None or max(abs(x - free[0]), 2 * abs(y - free[1])) > 30:
            dots, free = f"{dots}<text x='{x + 5:.1f}' y='{y - 5:.1f}'>k={k}</text>", (x, y)
    (left, bottom), (right, top) = place(0, 0), place(1, 1)
    axes = f"<path d='M{left},{top}V{bottom}H{right}' fill='none' stroke='#888'/>"
    ticks = "".join(
        f"<text x='{place(v, 0)[0]:.0f}' y='{bottom + 14:.0f}'>{v:g}</text><text x='8' y='{place(0, v)[1]:.0f}'>{v:g}</text>"
        for v in (0, 0.5, 1)
    )
    names = f"<text x='{size / 2 - 15:.0f}' y='{size - 6}'>recall</text><text x='8' y='{margin - 16}'>precision</text>"
    body = f"{axes}<polyline points='{line}' fill='none' stroke='#36c'/>{dots}{ticks}{names}"
    return section("Precision and recall", f"<svg width='{size}' height='{size}' font-size='11' role='img'>{body}</svg>")
