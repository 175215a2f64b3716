"""What a training run is: frozen dataclasses, one comment a field.

A config file assigns one of these to the name `config`; `--set a.b=c` replaces single fields.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flax.traverse_util import flatten_dict

from sam_jax.model.sam import Sam


class ConfigError(ValueError):
    """A configuration that cannot be run, and why."""


@dataclasses.dataclass(frozen=True)
class Interactive:
    """SAM's objective. The defaults are the paper's, or ours where it is silent."""

    points: int = 8  # clicks sampled after the first prompt, one a round
    extra_rounds: int = 2  # without new information: the last, and (if 2) one before some click
    focal: float = 20.0  # weight of the focal loss
    dice: float = 1.0  # weight of the dice loss
    iou: float = 1.0  # weight of the loss of the predicted IoU
    masks_per_image: int = 64  # at most, drawn at random
    multimask: bool = True  # three outputs for the first prompt; else the single one always
    multimask_extra: bool = False  # three outputs too where only an extra round followed the first
    detach_mask: bool = True  # no gradient through the mask prompt into the round before
    iou_all: bool = False  # the IoU loss on all three masks, not only on the best
    iou_l1: bool = False  # absolute instead of squared errors of the IoU
    loss_scale: int = 1  # 1, 2, 4: the loss at this multiple of the decoder's resolution
    box_noise: Literal["gaussian", "uniform"] = "gaussian"  # law of the first box's noise
    chunk: int = 16  # masks an image in one go; bounds the memory, does not change the result


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the examples come from."""

    source: str  # kind:place, e.g. sa1b:/data/sa1b, coco:DIR, labels:DIR, tfds:NAME, scenes
    held_out: str = ""  # slice of the source's images that only the evaluation sees, e.g. 0::5
    flips: bool = False  # mirror images left to right at random
    turns: bool = False  # turn images by a random multiple of 90 degrees
    half_size_jpeg: bool = False  # decode JPEGs at half size where the frame allows: faster
    workers: int = 0  # processes that decode; 0: threads of this one
    max_bad: float = 0.001  # fraction of unusable samples that ends the run


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up, drops and layer-wise decay of the image encoder's learning rate."""

    peak_lr: float = 8e-4
    warmup_steps: int = 250
    drop_at: tuple[int, ...] = (60_000, 86_666)  # steps at which the rate drops
    drop_by: float = 0.1  # factor of each drop
    weight_decay: float = 0.1  # not of biases, norms, embeddings and positions
    layer_decay: float = 0.8  # rate of each encoder block over that of the next
    b1: float = 0.9
    b2: float = 0.999


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    model: Sam
    data: Data
    objective: Interactive = Interactive()
    optimizer: Optimizer = Optimizer()
    batch_size: int = 256  # images
    num_steps: int = 90_000
    fsdp: int = 1  # devices over which each large array of the state is split
    init_from: str = ""  # weights to start from: whatever `sam_jax.load` takes
    match_attention: float = 0.0  # scale of matched first weights (`train.initial`); 0: none
    train_only: tuple[str, ...] = ()  # parts that learn, by parameter path; none: all
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps
    evaluate_every: int = 0  # steps; 0: only at the end
    profile: tuple[int, ...] = ()  # first and last step of a profiler's trace; none: no trace
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)


def check(config: TrainConfig) -> None:
    """Raises ConfigError, naming the field, for values that cannot be run."""
    model, objective, data = config.model, config.objective, config.data
    rules = [
        ("batch_size", config.batch_size, config.batch_size >= 1, "at least 1"),
        ("fsdp", config.fsdp, config.fsdp >= 1, "at least 1"),
        ("num_steps", config.num_steps, config.num_steps >= 1, "at least 1"),
        ("log_every", config.log_every, config.log_every >= 1, "at least 1"),
        ("checkpoint_every", config.checkpoint_every, config.checkpoint_every >= 1, "at least 1"),
        ("evaluate_every", config.evaluate_every, config.evaluate_every >= 0, "at least 0"),
        ("model.patch_size", model.patch_size, model.patch_size >= 1, "at least 1"),
        ("model.dropout", model.dropout,
         model.dropout == 0 or 1 / 256 <= model.dropout <= 255 / 256, "0, or 1/256 to 255/256"),
        ("objective.points", objective.points, 0 <= objective.points <= 16, "0 to 16"),
        ("objective.extra_rounds", objective.extra_rounds, objective.extra_rounds in (0, 1, 2),
         "0, 1 or 2"),
        ("objective.masks_per_image", objective.masks_per_image, objective.masks_per_image >= 1,
         "at least 1"),
        ("objective.chunk", objective.chunk, objective.chunk >= 1, "at least 1"),
        ("objective.loss_scale", objective.loss_scale, objective.loss_scale in (1, 2, 4),
         "1, 2 or 4"),
        ("data.source", data.source, bool(data.source), "kind:place"),
        ("data.max_bad", data.max_bad, 0 <= data.max_bad <= 1, "0 to 1"),
        ("profile", config.profile,
         len(config.profile) in (0, 2) and list(config.profile) == sorted(config.profile),
         "a first and a last step, or ()"),
        ("match_attention", config.match_attention, config.match_attention >= 0, "at least 0"),
        ("optimizer.drop_at", config.optimizer.drop_at,
         list(config.optimizer.drop_at) == sorted(config.optimizer.drop_at), "steps in order"),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps,
         config.optimizer.warmup_steps >= 0, "at least 0"),
    ]  # fmt: skip
    for name, got, holds, allowed in rules:
        if not holds:
            raise ConfigError(f"{name} must be {allowed}; got {got!r}")
    if not learns_encoder(config) and (data.flips or data.turns):
        raise ConfigError(
            "data.flips and data.turns must be False where the image encoder does not learn: its "
            f"embeddings are computed once; got train_only={config.train_only}"
        )
    patch = model.patch_size
    if any(side % patch or side <= 0 for side in model.image_size):
        raise ConfigError(
            f"model.image_size must be divisible by the patch of {patch} pixels; "
            f"got {model.image_size}"
        )
    if patch % (4 * objective.loss_scale):
        raise ConfigError(
            f"model.patch_size must be divisible by 4 x objective.loss_scale = "
            f"{4 * objective.loss_scale}, so that the loss is at whole pixels; got {patch}"
        )


def load_config(path: str) -> TrainConfig:
    """Runs a config file -> the value of its `config`.

    Raises:
      ConfigError: if there is no such file, it fails, or no TrainConfig is in it.
    """
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py") if p.name != "__init__.py")
        raise ConfigError(f"there is no config {path}; in configs/ there are {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"a config is a Python file, config.py; got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path} must assign a TrainConfig to `config`; got {config!r}")
    return config


def override(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """Replaces fields by 'a.b=c', values written as in Python (text needs no quotes).

    Of several settings of one field the last holds. Rules are checked once all are made.

    Raises:
      ConfigError: naming the fields there are, for an unknown one or a value of a wrong type.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes FIELD=VALUE; got {setting!r}")
        names = path.split(".")
        value = _parse(text, _type_of(config, names, path), path)
        at = changes
        for name in names[:-1]:
            at = at.setdefault(name, {})
        at[names[-1]] = value
    return _replace(config, changes)


def _type_of(value: Any, names: list[str], path: str) -> Any:
    """The type of a field of a field of ... a dataclass."""
    kind = None
    for i, name in enumerate(names):
        fields, owner = _fields(value), type(value).__name__
        if not fields:
            raise ConfigError(f"{path}: {names[i - 1]} is a {owner}, which has no fields")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"there is no field {path}{hint} {owner} has {', '.join(fields)}")
        kind, value = fields[name], getattr(value, name)
    if _fields(value):
        raise ConfigError(f"{path} has fields of its own: {', '.join(_fields(value))}")
    return kind


def _replace(value: Any, changes: dict[str, Any]) -> Any:
    """Replaces fields; a dict stands for fields of a field."""
    new = {
        name: _replace(getattr(value, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(value, **new)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass (of a module, without Flax's own) and their types."""
    if not dataclasses.is_dataclass(value):
        return {}
    types_of = typing.get_type_hints(type(value))
    return {f.name: types_of[f.name] for f in dataclasses.fields(value) if f.name not in FLAX}


FLAX = ("name", "parent")


def _parse(text: str, kind: Any, path: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is str:
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if typing.get_origin(kind) is tuple and isinstance(value, str):
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    elif typing.get_origin(kind) is tuple and not isinstance(value, tuple):
        value = (value,)
    if not _is_a(value, kind):
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        name = getattr(kind, "__name__", name) if not typing.get_args(kind) else str(kind)
        raise ConfigError(f"{path} must be of type {name}; got {text!r}")
    return value


def _is_a(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_is_a(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(_is_a, value, args))
    return type(value) is kind


def to_dict(value: Any) -> Any:
    """A configuration, or a model, as a dict of what JSON can hold."""
    fields = _fields(value)
    if fields:
        return {name: to_dict(getattr(value, name)) for name in fields}
    return list(value) if isinstance(value, tuple) else value


def to_json(config: TrainConfig) -> str:
    """The whole configuration as JSON, to be read."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def differences(before: dict, now: dict, ignore: Sequence[str] = ()) -> list[str]:
    """Fields 'a.b' in which two results of `to_dict` differ, as 'a.b was 1, is 2'."""
    before, now = (flatten_dict(x, sep=".") for x in (before, now))
    names = [name for name in {**before, **now} if name not in ignore]
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def learns_encoder(config: TrainConfig) -> bool:
    """Whether any part of the image encoder learns."""
    parts = (part.split("/")[0] for part in config.train_only)
    return not config.train_only or "image_encoder" in parts
