"""GenPipeline: what all pipelines share. Opens packaged models, folders, hub ids and official files; saves; drains the step loop.

Subclasses write `iterate(...)`, a generator that yields a `StepState` after each step, and `__call__`, which drains it.
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from genkit.blocks.integer import has_integers
from genkit.catalogue import INDEX, shared_folder
from genkit.checks import choose, unknown
from genkit.paths import whole_folder
from genkit.pipelines import loading
from genkit.pipelines.outputs import StepState

State = TypeVar("State", bound=StepState)
Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]


class GenPipeline(DiffusionPipeline):
    """Base of all pipelines.

    Example:
        >>> pipe = GenPipeline.from_pretrained("genkit/enat-lowpoly")  # doctest: +SKIP
        >>> pipe("a wooden table").images[0].save("table.png")  # doctest: +SKIP
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["sample"]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a component of ours is noted as ["genkit", "ClassName"], so that files can move without breaking folders."""
        super().__setattr__(name, value)
        config = self.__dict__.get("_internal_dict", {})
        if name in config and isinstance(config[name], list | tuple) and value is not None:
            cls = type(getattr(value, "_orig_mod", value))  # a compiled module wraps the original
            if cls.__module__.split(".")[0] == "genkit":
                self.register_to_config(**{name: ("genkit", cls.__name__)})

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        variant: str | None = None,
        **options: Any,
    ) -> Self:
        """Open a pipeline.

        Args:
            name_or_path: packaged name (`genkit/...`, looked up first), local pipeline folder, hub id, or an official checkpoint as its
                authors published it (file, folder or hub id), which is converted in memory; the log says what was mapped and dropped.
            torch_dtype: type of the weights, fp32 if None.
            device: where to put them.
            variant: of the weight files, such as 'fp16'.
            **options: components or settings that replace those of the folder (`scheduler=...`); hub options (`revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download`); for official checkpoints what the file does not tell.

        Returns:
            The concrete pipeline in eval mode.

        Raises:
            FileNotFoundError: for a path that does not exist or files that are missing.
            ValueError: for unknown names, classes or config keys, corrupt files, pickles, non-finite weights, tensors that do not fit.
            TypeError: for unknown options.
            OSError: if a hub repository cannot be reached.
        """
        hub = {name: options.pop(name) for name in loading.HUB_OPTIONS & options.keys()}
        path = loading.locate(name_or_path)
        if path is None:
            official = _official_hub_model(str(name_or_path))
            if official is not None:
                system, model = official
                folder = loading.download(model.hub_id, list(model.files), **hub)
                pipe = _from_official(system, folder, {**model.options, **options}, torch_dtype)
                return _placed(cls, pipe, device)
            path = loading.download(str(name_or_path), loading.HUB_FILES, **hub)
        elif hub:
            raise TypeError(f"{', '.join(sorted(hub))}: hub options are for hub ids, but {str(name_or_path)!r} is local.")
        if path.is_dir() and (path / INDEX).is_file():
            return _placed(cls, _from_folder(path, options, torch_dtype, variant), device)
        return _placed(cls, _from_official_path(path, options, torch_dtype), device)

    def save_pretrained(
        self, save_directory: str | Path, *, shared: Mapping[str, str] | None = None, variant: str | None = None, **options: Any
    ) -> None:
        """Write the pipeline as a folder of safetensors and configs, completely or not at all.

        Args:
            save_directory: folder to write.
            shared: component -> folder below `genkit/pretrained` (`{"text_encoder": "text-lowpoly/text_encoder"}`) for packaged models that
                share it; such a component is named, not written. Without it the folder is self-contained.
            variant: of the weight files, such as 'fp16'.
            **options: of diffusers' `save_pretrained` (`max_shard_size`, `push_to_hub`, `repo_id`, ...).

        Raises:
            ValueError: if pickles are asked for or a shared component does not exist.
        """
        if not options.pop("safe_serialization", True):
            raise ValueError("save_pretrained: safe_serialization=False would write pickles; genkit writes safetensors only.")
        if any(has_integers(part) for part in self.components.values() if isinstance(part, nn.Module)):
            raise ValueError(
                "save_pretrained: weights after to_int8 are not saved; save the model before, and call to_int8 when it is opened."
            )
        target = Path(save_directory)
        for entry in (shared or {}).values():
            shared_folder(entry)
        if options.get("push_to_hub"):
            options.setdefault("repo_id", target.name)
        with whole_folder(target) as folder, loading.quiet():
            super().save_pretrained(str(folder), safe_serialization=True, variant=variant, **options)
            _make_portable(folder)
            if shared:
                _name_shared(folder, shared)

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Add a LoRA to the weights of the generator (`transformer`, else `unet`); open the model anew to be without it.

        Args:
            path: folder as a training with `lora` or peft writes it.
            scale: factor of the change; negative ones lead away from it.

        Raises:
            FileNotFoundError: if it is no LoRA. ValueError: if it is for another model.
        """
        from genkit.blocks.lora import LoRAWeights

        LoRAWeights.load(path).apply(self._generator("a LoRA could change"), scale)

    def to_int8(self, inputs: bool = False) -> None:
        """Turn the linear maps of the generator (`transformer`, else `unet`) into 8-bit integers, see `genkit.blocks.integer.to_int8`.

        Args:
            inputs: round the inputs of these maps too. Open the model anew to be without.

        Raises:
            ImportError: without torchao.
        """
        from genkit.blocks.integer import to_int8

        to_int8(self._generator("integers could stand in"), inputs)

    def _generator(self, purpose: str) -> nn.Module:
        """Return the generating network; raises ValueError where there is none."""
        generator = getattr(self, "transformer", None) or getattr(self, "unet", None)
        if generator is None:
            raise ValueError(f"{type(self).__name__} has no generator that {purpose}.")
        return cast(nn.Module, generator)

    def drain(
        self,
        states: Iterator[State],
        num_steps: int,
        callback: Callback | None = None,
        callback_inputs: Sequence[str] = ("sample",),
    ) -> State:
        """Run a step loop to its end with a progress bar.

        Args:
            states: what `iterate` returned.
            num_steps: length of the progress bar.
            callback: called after each step as callback(pipe, step, timestep, fields); may return a dict with a new `sample`.
            callback_inputs: names of the state's fields that the callback gets.

        Returns:
            The last state.

        Raises:
            ValueError: if the callback returns a field that cannot be changed.
        """
        last = None
        with self.progress_bar(total=num_steps) as bar:
            for last in states:
                if callback is not None:
                    fields = {name: getattr(last, name) for name in callback_inputs}
                    for name, value in (callback(self, last.index, last.timestep, fields) or {}).items():
                        if name == "sample":
                            last.sample = value
                        elif fields.get(name) is not value:
                            raise ValueError(f"callback_on_step_end returned a new {name!r}; only 'sample' can be changed.")
                bar.update()
        if last is None:
            raise RuntimeError("the loop made no step: the state it was to go on from is already the last one.")
        return last

    def check_callback_inputs(self, names: Sequence[str]) -> None:
        """Refuse names that a callback cannot get.

        Raises:
            ValueError: naming the nearest.
        """
        for name in names:
            choose(name, self._callback_tensor_inputs, "callback_on_step_end_tensor_inputs entry")

    def weight_bytes(self) -> int:
        """Return the bytes of all components' weights."""
        modules = [part for part in self.components.values() if isinstance(part, nn.Module)]
        return sum(t.numel() * t.element_size() for module in modules for t in [*module.parameters(), *module.buffers()])

    @classmethod
    def complete(cls, components: dict[str, Any]) -> dict[str, Any]:
        """Return the components of an official checkpoint with those added that follow from them (a scheduler, say)."""
        return components


def check_sampling(steps: int, per_prompt: int, guidance_scale: float) -> None:
    """Refuse numbers that no loop can be run with.

    Raises:
        ValueError: naming them.
    """
    if steps < 1 or per_prompt < 1 or not math.isfinite(guidance_scale):
        given = f"{steps}, {per_prompt} and guidance_scale={guidance_scale}"
        raise ValueError(f"num_inference_steps and num_images_per_prompt must be at least 1, guidance finite, got {given}.")


def samples_at_once_or_default(samples_at_once: int | None, device: torch.device) -> int:
    """Return how many samples the networks evaluate together: one on a CPU, where bits then do not depend on the batch; all elsewhere.

    Raises:
        ValueError: for less than 1.
    """
    if samples_at_once is None:
        return 1 if device.type == "cpu" else 2**31
    if samples_at_once < 1:
        raise ValueError(f"samples_at_once must be at least 1, got {samples_at_once}.")
    return samples_at_once


def _placed(cls: type[Any], pipe: GenPipeline, device: str | torch.device | None) -> Any:
    """Check that a pipeline is of the class it was asked of, and move it."""
    if not isinstance(pipe, cls):
        raise ValueError(f"{cls.__name__}.from_pretrained: the model is a {type(pipe).__name__}; open it with that class or GenPipeline.")
    return pipe.to(device) if device is not None else pipe


def _from_folder(folder: Path, options: dict[str, Any], torch_dtype: torch.dtype | None, variant: str | None) -> GenPipeline:
    """Open a pipeline folder."""
    index = loading.read_index(folder)
    cls = loading.pipeline_class(index, folder / INDEX)
    accepted = set(inspect.signature(cls.__init__).parameters) - {"self"}
    loading.check_options(options, accepted, f"{cls.__name__}.from_pretrained")
    settings = {key: value for key, value in index.items() if not key.startswith("_") and key in accepted}
    for key in index:
        if not key.startswith("_") and key not in accepted:
            raise ValueError(f"{str(folder / INDEX)!r}: {unknown(key, accepted, f'{cls.__name__} key')}")
    settings |= loading.load_components(folder, index, options, torch_dtype, variant) | options
    absent = [name for name in loading.required(cls) if settings.get(name) is None]
    if absent:
        raise ValueError(f"{str(folder / INDEX)!r} lacks {', '.join(absent)}, which {cls.__name__} needs.")
    pipe: GenPipeline = cls(**settings)
    return pipe


def _from_official_path(path: Path, options: dict[str, Any], torch_dtype: torch.dtype | None) -> GenPipeline:
    """Open an official file or folder, recognised by its layout."""
    from genkit import convert

    found = convert.recognise(path)
    if found is None:
        if path.is_dir():
            loading.read_index(path)
        raise ValueError(f"{str(path)!r} is no official checkpoint that genkit knows ({', '.join(convert.systems())}); see `genkit list`.")
    return _from_official(found[0], found[1], options, torch_dtype)


def _from_official(system: str, path: Path, options: dict[str, Any], torch_dtype: torch.dtype | None) -> GenPipeline:
    """Convert an official checkpoint in memory and complete it to a pipeline."""
    import genkit
    from genkit import convert

    module = convert.module(system)
    if module.PIPELINE is None:
        raise ValueError(
            f"{str(path)!r} holds a {system} {module.COMPONENT}, not a whole pipeline; open it with genkit.convert.load({system!r}, path)."
        )
    cls = getattr(genkit, module.PIPELINE)
    accepted = set(inspect.signature(cls.__init__).parameters) - {"self", module.COMPONENT}
    own = {name: options[name] for name in accepted & options.keys()}
    model = convert.load(system, path, **{name: value for name, value in options.items() if name not in own})
    others = module.companions(path) if hasattr(module, "companions") else {}
    components = cls.complete({module.COMPONENT: model, **others, **own})
    absent = [name for name in loading.required(cls) if components.get(name) is None]
    if absent:
        raise ValueError(
            f"the official file {str(path)!r} holds the {module.COMPONENT} only; also pass {', '.join(f'{name}=...' for name in absent)}."
        )
    for component in components.values():
        if isinstance(component, nn.Module) and torch_dtype is not None:
            component.to(torch_dtype)
    pipe: GenPipeline = cls(**components)
    return pipe


def _official_hub_model(hub_id: str) -> tuple[str, Any] | None:
    """Return system and entry of the official model that lives under a hub id."""
    from genkit import convert

    for system in convert.systems():
        for model in convert.module(system).OFFICIAL:
            if model.hub_id == hub_id:
                return system, model
    return None


def _make_portable(folder: Path) -> None:
    """Take what means nothing elsewhere out of a saved pipeline: source folders, and the name transformers 5 gives fast tokenizers.

    Version 4 knows them as `PreTrainedTokenizerFast` only; version 5 accepts that name too.
    """
    for path in [*folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "is_local", "local_files_only")}
        if kept.get("tokenizer_class") == "TokenizersBackend":
            kept["tokenizer_class"] = "PreTrainedTokenizerFast"
        if kept != config:
            _write_json(path, kept)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if ["transformers", "TokenizersBackend"] in index.values():
        renamed = ["transformers", "PreTrainedTokenizerFast"]
        _write_json(folder / INDEX, {k: renamed if v == ["transformers", "TokenizersBackend"] else v for k, v in index.items()})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_shared(folder: Path, shared: Mapping[str, str]) -> None:
    """Replace components of a saved pipeline by the names of shared folders."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for name in shared:
        if name not in index:
            raise ValueError(
                f"save_pretrained: shared component {name!r} is none of the pipeline's: {', '.join(k for k in index if k[0] != '_')}."
            )
        shutil.rmtree(folder / name)
    index["_shared"] = dict(shared)
    _write_json(folder / INDEX, index)
