"""The configuration of a training run: frozen dataclasses with one comment per field."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from sam_jax.data.jitter import Unit
from sam_jax.model.fields import Rule, check_rules
from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says why."""


@dataclasses.dataclass(frozen=True)
class Interactive:
    """SAM's objective. The defaults are the paper's, or ours where the paper gives no value."""

    num_clicks: int = 8  # clicks sampled after the first prompt, one per round
    num_extra_rounds: int = 2  # rounds without a new point: the last, and (if 2) one before a click
    focal: float = 20.0  # weight of the focal loss
    dice: float = 1.0  # weight of the dice loss
    iou: float = 1.0  # weight of the loss of the predicted IoU
    masks_per_image: int = 64  # at most, sampled at random
    multimask: bool = True  # three outputs for the first prompt; otherwise always the single one
    multimask_extra: bool = False  # three outputs until the first click, also in an extra round
    detach_mask: bool = True  # no gradient flows through the mask prompt into the round before
    iou_supervision: Literal["best", "all"] = "best"  # masks whose predicted IoU is supervised
    iou_loss: Literal["mse", "l1"] = "mse"  # squared or absolute error of the predicted IoU
    loss_scale: int = 1  # 1, 2 or 4: the loss's resolution as a multiple of the decoder's
    box_noise: Literal["gaussian", "uniform"] = "gaussian"  # distribution of the first box's noise
    masks_per_chunk: int = 16  # masks processed at once; bounds the memory, not the result

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield Rule("num_clicks", self.num_clicks, 0 <= self.num_clicks <= 16, "0 to 16")
        extra = self.num_extra_rounds
        yield Rule("num_extra_rounds", extra, extra in (0, 1, 2), "0, 1 or 2")
        for name in ("focal", "dice", "iou"):
            yield at_least(name, getattr(self, name), 0)
        yield at_least("masks_per_image", self.masks_per_image, 1)
        yield at_least("masks_per_chunk", self.masks_per_chunk, 1)
        yield Rule("loss_scale", self.loss_scale, self.loss_scale in (1, 2, 4), "1, 2 or 4")


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The masked autoencoder's objective."""

    normalized: bool = True  # each patch is normalized by its own mean and deviation

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield from ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """The images to train on; common to all tasks."""

    source: str  # KIND:LOCATION, see sam_jax.data.open, e.g. sa1b:/data/sa1b, coco:DIR, scenes
    held_out: str = ""  # slice of the source's images for evaluation only, e.g. 0::5
    flips: bool = False  # mirror images left to right at random
    rot90: bool = False  # rotate images by a random multiple of 90 degrees
    half_size_jpeg: bool = False  # decode JPEGs at half size where the model's size allows: faster
    workers: int = 0  # processes that decode; 0: threads of this process
    max_bad: float = 0.001  # fraction of unusable images above which the run stops

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield Rule("source", self.source, bool(self.source), "KIND:LOCATION")
        yield at_least("workers", self.workers, 0)
        yield Rule("max_bad", self.max_bad, 0 <= self.max_bad <= 1, "0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Images):
    """The images with masks that SAM is trained on."""

    jitter: tuple[float, ...] = ()  # smallest and largest scale of a random window; (): none
    jitter_unit: Unit = "canvas"  # what fits into the canvas at scale 1, see data/jitter.py
    views: int = 0  # fixed views per image, so that features can be kept; 0: always new ones

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield from super().rules()
        jitter = self.jitter
        is_range = len(jitter) == 2 and 0 < jitter[0] <= jitter[1]
        allowed = "a smallest and a largest scale above 0, or ()"
        yield Rule("jitter", jitter, is_range or not jitter, allowed)
        yield at_least("views", self.views, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainData(Images):
    """The images, of which random crops are used, that a masked autoencoder is trained on."""

    flips: bool = True  # mirror images left to right at random
    min_area: float = 0.2  # smallest area of a crop, as a fraction of the image

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        yield from super().rules()
        yield Rule("min_area", self.min_area, 0 < self.min_area <= 1, "more than 0, at most 1")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up, step drops and layer-wise decay of the encoder's learning rate."""

    peak_lr: float = 8e-4
    warmup_steps: int = 250
    lr_boundaries: tuple[int, ...] = (60_000, 86_666)  # steps at which the learning rate drops
    lr_decay_factor: float = 0.1  # factor of each drop
    cosine_steps: int = 0  # step at which a half-cosine reaches 0; 0: none
    cosine_start: int = 0  # step at which the half-cosine begins; 0: after the warm-up
    weight_decay: float = 0.1  # not of biases, norms, positions and some tokens
    layer_decay: float = 0.8  # learning rate of an encoder block, as a fraction of the next one's
    b1: float = 0.9
    b2: float = 0.999

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        lr, layer_decay = self.peak_lr, self.layer_decay
        yield Rule("peak_lr", lr, 0 < lr < math.inf, "above 0")
        yield Rule("layer_decay", layer_decay, 0 < layer_decay <= 1, "above 0, at most 1")
        yield Rule("lr_decay_factor", self.lr_decay_factor, self.lr_decay_factor > 0, "above 0")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            yield Rule(name, value, 0 <= value < 1, "at least 0 and below 1")
        yield at_least("weight_decay", self.weight_decay, 0)
        yield at_least("warmup_steps", self.warmup_steps, 0)
        is_sorted = list(self.lr_boundaries) == sorted(self.lr_boundaries)
        yield Rule("lr_boundaries", self.lr_boundaries, is_sorted, "steps in ascending order")
        is_after_warmup = self.cosine_steps == 0 or self.cosine_steps > self.warmup_steps
        allowed = f"0, or more than optimizer.warmup_steps = {self.warmup_steps}"
        yield Rule("cosine_steps", self.cosine_steps, is_after_warmup, allowed)
        allowed = f"0, or less than optimizer.cosine_steps = {self.cosine_steps}"
        is_before = self.cosine_start == 0 or 0 < self.cosine_start < self.cosine_steps
        yield Rule("cosine_start", self.cosine_start, is_before, allowed)


# Fields of the data that stages may change. All stages read the same images.
STAGE_DATA = ("flips", "rot90", "min_area", "jitter", "jitter_unit", "views")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A later part of a run. A field that is None keeps the value of the run."""

    start: int  # steps done when the stage begins
    objective: Interactive | Reconstruction | None = None
    data: Data | PretrainData | None = None  # may differ in the fields of STAGE_DATA
    batch_size: int | None = None
    trainable: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. The model determines the task; see `train.tasks.base.TASKS`."""

    model: Sam | MaskedAutoencoder
    data: Data | PretrainData
    objective: Interactive | Reconstruction = Interactive()
    optimizer: Optimizer = Optimizer()
    batch_size: int = 256  # images
    num_steps: int = 90_000
    stages: tuple[Stage, ...] = ()  # later parts of the run, in the order of their starts
    fsdp: int = 1  # devices over which each large array of the state is sharded
    init_from: str = ""  # initial weights: PATH, or PART=PATH,PART=PATH; see train.initialization
    fit_neck: bool = False  # begin the neck as a projection of the encoder's features on images
    mimetic_init_scale: float = 0.0  # scale of mimetic initial attention weights; 0: none
    trainable: tuple[str, ...] = ()  # parts to train, by parameter path; empty: all
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps
    evaluate_every: int = 0  # steps; 0: only at the end
    feature_cache: str = "~/.cache/sam_jax/features"  # folder for features of frozen encoders
    max_bad_steps: int = 10  # steps in a row with a non-finite loss or gradient that stop the run
    profile: tuple[int, ...] = ()  # first and last step of a profiler's trace; empty: no trace
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the field, for values that no task can run."""
        try:
            check_rules(self.rules())
            check_rules(self.objective.rules(), "objective.")
            check_rules(self.data.rules(), "data.")
            check_rules(self.optimizer.rules(), "optimizer.")
            check_rules(self._stage_rules())
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            self.model.validate()
        except ValueError as error:
            raise ConfigError(f"model.{error}") from error
        self.parts()

    def parts(self) -> list[tuple[int, int, "TrainConfig"]]:
        """Returns the stages of the run: their first and last steps, and their configurations.

        The first stage has the fields of the run itself. Stages that begin after the last step of
        the run are left out. No configuration that is returned has stages.
        """
        first = dataclasses.replace(self, stages=()) if self.stages else self
        starts, configs = [0], [first]
        for stage in self.stages:
            fields = ("objective", "data", "batch_size", "trainable")
            values = {name: getattr(stage, name) for name in fields}
            changes = {name: value for name, value in values.items() if value is not None}
            starts.append(stage.start)
            configs.append(dataclasses.replace(first, **changes))
        stops = [min(stop, self.num_steps) for stop in (*starts[1:], self.num_steps)]
        parts = zip(starts, stops, configs, strict=True)
        return [part for part in parts if part[0] < self.num_steps]

    def _stage_rules(self) -> Iterator[Rule]:
        starts = tuple(stage.start for stage in self.stages)
        is_ascending = list(starts) == sorted({*starts}) and min(starts, default=1) > 0
        yield Rule("stages", starts, is_ascending, "in the order of their starts, all above 0")
        for i, stage in enumerate(self.stages):
            if stage.data is not None:
                for field in dataclasses.fields(self.data):
                    value, run_value = (
                        getattr(data, field.name, None) for data in (stage.data, self.data)
                    )
                    if field.name not in STAGE_DATA:
                        allowed = f"that of the run, {run_value!r}"
                        name = f"stages[{i}].data.{field.name}"
                        yield Rule(name, value, value == run_value, allowed)

    def rules(self) -> Iterator[Rule]:
        """Yields the rules that the fields must obey."""
        for name in ("batch_size", "fsdp", "num_steps", "log_every", "checkpoint_every"):
            yield at_least(name, getattr(self, name), 1)
        yield at_least("max_bad_steps", self.max_bad_steps, 1)
        yield at_least("evaluate_every", self.evaluate_every, 0)
        yield at_least("mimetic_init_scale", self.mimetic_init_scale, 0)
        yield Rule("seed", self.seed, 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        is_range = len(self.profile) in (0, 2) and list(self.profile) == sorted(self.profile)
        yield Rule("profile", self.profile, is_range, "a first and a last step, or ()")


def at_least(name: str, value: float, minimum: int) -> Rule:
    """Returns the rule that a field is finite and at least `minimum`."""
    return Rule(name, value, minimum <= value < math.inf, f"at least {minimum}")
