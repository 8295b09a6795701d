"""Pages of reports: one HTML file each that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

THUMBNAIL = 96
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{border-bottom:1px solid #ddd;padding:.25rem .7rem;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}.warn{color:#a33}.grid{display:flex;flex-wrap:wrap;gap:4px}
.grid img,.pair img{width:96px;height:96px;object-fit:contain;image-rendering:pixelated;background:#f4f4f4}
.pair{display:inline-block;margin:4px;font-size:12px;text-align:center}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page of parts that are HTML already."""
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def escape(value: object) -> str:
    """Return a value as text of a page."""
    return html.escape(str(value))


def section(title: str, body: str) -> str:
    """Return a part with a heading; `body` is HTML."""
    return f"<h2>{escape(title)}</h2>{body}"


def image(pixels: np.ndarray[Any, np.dtype[np.uint8]], name: str) -> str:
    """Return a picture [h, w, 3] uint8 as an img element, reduced where it is larger than two thumbnails."""
    picture = Image.fromarray(pixels)
    if max(picture.size) > 2 * THUMBNAIL:
        picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"<img src='data:image/png;base64,{encoded}' alt='{escape(name)}' title='{escape(name)}'>"
