"""From a prompt to an asset: text -> picture -> shape -> low-poly mesh -> turntable, each by a pipeline of its own.

Every stage writes its file and notes in `make.json` what it was made with. Run again, a stage whose notes are the same and whose file is
there is not repeated; one whose model, seed or options changed is, with all stages behind it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genkit.data.files import atomic_write
from genkit.pipelines.base import GenPipeline

NOTES = "make.json"
FILES = {"picture": "picture.png", "shape": "shape.glb", "mesh": "mesh.glb", "turntable": "turntable.gif"}
VIEWS, SIZE, SECONDS = 32, 256, 3.0


@dataclass(frozen=True)
class ChainConfig:
    """What an asset is made with.

    Args:
        prompt: text; what the picture shows.
        image_model, shape_model, mesh_model: names or folders of pipelines.
        seed: of every stage.
        max_faces: of the low-poly mesh; None: the model's own.
        candidates: low-poly meshes that are drawn, of which the nearest to the shape is kept; 1 takes the most probable tokens instead;
            None: as many as the model wants.
        device: of the pipelines.
    """

    prompt: str
    image_model: str
    shape_model: str
    mesh_model: str
    seed: int = 0
    max_faces: int | None = None
    candidates: int | None = None
    device: str = "cpu"


@dataclass
class StageNote:
    """What a stage was made with and how long it took.

    Args:
        file: its name in the folder.
        made_with: model, seed and options, and a digest of the notes before.
        seconds: with loading.
        facts: about the result.
    """

    file: str
    made_with: dict[str, Any]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


Tell = Callable[[str, StageNote, bool], None]


def make_asset(config: ChainConfig, out: Path, tell: Tell = lambda name, note, is_old: None) -> dict[str, StageNote]:
    """Run the stages that are not done yet.

    Args:
        config: what to make.
        out: folder of the files; created if needed.
        tell: called after each stage as tell(name, note, was it there already).

    Returns:
        The notes of all stages by name.

    Raises:
        ValueError: for an empty prompt, or a model that does not do what its stage needs.
    """
    if not config.prompt.strip():
        raise ValueError("the prompt is empty; say what to make.")
    out.mkdir(parents=True, exist_ok=True)
    before, notes = _read(out / NOTES), {}
    stages: dict[str, tuple[dict[str, Any], Callable[[Path], dict[str, Any]]]] = {
        "picture": ({"model": config.image_model, "prompt": config.prompt}, lambda path: _picture(config, path)),
        "shape": ({"model": config.shape_model}, lambda path: _shape(config, out / FILES["picture"], path)),
        "mesh": (
            {"model": config.mesh_model, "max_faces": config.max_faces, "candidates": config.candidates},
            lambda path: _mesh(config, out / FILES["shape"], path),
        ),
        "turntable": ({"views": VIEWS, "size": SIZE}, lambda path: _turntable(out / FILES["mesh"], path)),
    }
    digest = ""
    for name, (options, run) in stages.items():
        made_with = {**options, "seed": config.seed, "after": digest}
        path, old = out / FILES[name], before.get(name)
        is_old = old is not None and old.made_with == made_with and path.is_file()
        if is_old and old is not None:
            note = old
        else:
            began = time.perf_counter()
            facts = run(path)
            note = StageNote(path.name, made_with, round(time.perf_counter() - began, 3), facts)
        notes[name] = note
        digest = hashlib.sha256(json.dumps(note.made_with, sort_keys=True).encode()).hexdigest()[:16]
        with atomic_write(out / NOTES) as file:
            stored = {"config": asdict(config), "stages": {key: asdict(value) for key, value in notes.items()}}
            file.write(json.dumps(stored, indent=1).encode())
        tell(name, note, is_old)
    return notes


def _read(path: Path) -> dict[str, StageNote]:
    """Return the notes of an earlier run; none where there are none, or they cannot be read."""
    if not path.is_file():
        return {}
    try:
        return {name: StageNote(**note) for name, note in json.loads(path.read_text(encoding="utf-8"))["stages"].items()}
    except (ValueError, KeyError, TypeError):
        return {}


def _open(name: str, config: ChainConfig, has: str, makes: str) -> Any:
    """Open a pipeline that has a component.

    Raises:
        ValueError: if it has not.
    """
    pipe: Any = GenPipeline.from_pretrained(name, device=config.device)
    if has not in pipe.components:
        raise ValueError(f"{name} is a {type(pipe).__name__}, which makes no {makes}; `genkit list` says what each model makes.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _picture(config: ChainConfig, path: Path) -> dict[str, Any]:
    pipe: Any = GenPipeline.from_pretrained(config.image_model, device=config.device)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(config.prompt, generator=[config.seed])
    if not hasattr(output, "images"):
        raise ValueError(f"{config.image_model} is a {type(pipe).__name__}, which makes no pictures.")
    output.images[0].save(path)
    return {"size": list(output.images[0].size)}


def _shape(config: ChainConfig, picture: Path, path: Path) -> dict[str, Any]:
    from PIL import Image

    pipe = _open(config.shape_model, config, "vae", "shapes of pictures")
    with Image.open(picture) as image:
        mesh = pipe(image.convert("RGB"), generator=[config.seed]).meshes[0]
    mesh.export(path)
    return {"faces": len(mesh.faces), "watertight": bool(mesh.is_watertight)}


def _mesh(config: ChainConfig, shape: Path, path: Path) -> dict[str, Any]:
    import trimesh

    pipe = _open(config.mesh_model, config, "point_encoder", "meshes of shapes")
    shapes = trimesh.load(shape, force="mesh")
    output = pipe(shapes, max_faces=config.max_faces, candidates=config.candidates, generator=[config.seed])
    output.meshes[0].export(path)
    report = output.reports[0]
    return {"faces": report.faces, "tokens": report.tokens, "complete": report.is_complete}


def _turntable(mesh: Path, path: Path) -> dict[str, Any]:
    import trimesh

    from genkit.data.rendering import turntable
    from genkit.data.video_files import write_clip

    write_clip(path, turntable(trimesh.load(mesh, force="mesh"), VIEWS, SIZE), VIEWS / SECONDS)
    return {"views": VIEWS}
