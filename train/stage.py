"""One stage of a run: steps with one objective, one batch size and one set of trained parts."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from sam_jax.data.open import Subset
from train.bad_samples import BadSamples
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.data import make_loader
from train.divergence import BadSteps, check_finite
from train.flops import peak_flops
from train.metrics import Metrics, summarize
from train.preemption import Stopped, StopSignals
from train.profiler import Profiler
from train.remote_workdir import RemoteWorkdir
from train.sharding import process_allgather, shard_batch
from train.state import TrainState
from train.step import make_step
from train.tasks.base import Task, make_task
from train.watchdog import Watchdog
from train.workdir import is_lead_host, per_host_name

log = logging.getLogger("train")


class Context(NamedTuple):
    """The parts of a run that all of its stages share.

    Attributes:
      run_task: The task of the run itself, by which all stages are evaluated in the same way.
      mesh: The devices.
      remote: The workdir.
      checkpoints: Its checkpoints.
      metrics: Its metrics; None on hosts that do not write.
      bad_samples: The images that could not be used.
      bad_steps: The steps that changed nothing.
      watchdog: Ends the run if no step finishes.
      train_split: The images to train on.
      eval_split: The images to evaluate on.
      signals: The signals that stop the run.
    """

    run_task: Task
    mesh: Mesh
    remote: RemoteWorkdir
    checkpoints: Checkpoints
    metrics: Metrics | None
    bad_samples: BadSamples
    bad_steps: BadSteps
    watchdog: Watchdog
    train_split: Subset
    eval_split: Subset
    signals: StopSignals


def train_stage(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    start: int,
    stop: int,
    context: Context,
) -> TrainState:
    """Trains from one step to another with the configuration of one stage.

    Args:
      config: The configuration of the stage.
      optimizer: Its optimizer.
      state: The state to start from.
      start: The number of steps done.
      stop: The number of steps done at the end of the stage.
      context: The parts that the stages share.

    Returns:
      The last state.

    Raises:
      Stopped: If a signal stops the run.
    """
    mesh, metrics, watchdog = context.mesh, context.metrics, context.watchdog
    watchdog.begin("compilation")
    task = make_task(config)
    step = make_step(
        task.objective,
        optimizer,
        config.seed,
        mesh,
        state,
        config.model.dtype,
        config.trainable,
    )

    # The batches from this step on. They depend on the seed and the step only.
    batch_transform = task.batch_transform(
        functools.partial(gather_variables, mesh, state),
        context.train_split,
        per_host_name("host"),
    )
    loader = make_loader(config, task, context.train_split)
    if metrics:
        metrics.begin_stage(config.batch_size, peak_step_seconds(config, task, mesh))

    if start and is_due(start, config.evaluate_every):
        evaluate(start, state, context)  # unless it was evaluated before the run was stopped
    loaded = loader.batches(start, stop, config.data.workers)
    watchdog.describe = loaded.describe
    profiler = Profiler(context.remote.folder / "profile", config.profile if metrics else ())
    with contextlib.closing(loaded), contextlib.closing(profiler):
        batches = metrics.timed(loaded) if metrics else loaded
        for done, (batch, skipped) in enumerate(batches, start=start + 1):
            context.bad_samples.add(skipped)
            profiler.begin_step(done)
            batch = batch_transform(batch)
            compilation = log_compilation() if done == start + 1 else contextlib.nullcontext()
            with compilation, jax.transfer_guard("disallow"):
                state, values = step(state, shard_batch(mesh, batch))
            context.bad_steps.add(done, values.pop("is_finite"))
            watchdog.advance(values["loss"])
            profiler.end_step(done, values)
            if metrics:
                metrics.advance()
            finish_step(done, config, state, values, context)
    return state


def finish_step(
    done: int, config: TrainConfig, state: TrainState, values: dict[str, Any], context: Context
) -> None:
    """Logs, evaluates and saves what is due after a step.

    Everything is due by step and never by the clock, so that all hosts do it together.

    Args:
      done: The number of steps done.
      config: The configuration of the stage.
      state: The state after the step.
      values: The values that the step returned.
      context: The parts that the stages share.

    Raises:
      Stopped: If a signal stops the run after this step.
    """
    is_last = done == config.num_steps
    if is_last or is_due(done, config.log_every):
        context.bad_steps.read()
        if context.metrics:
            row = summarize(jax.device_get(values))
            context.metrics.log(done, row | {"bad_steps": context.bad_steps.take_count()})
    if not is_last and is_due(done, config.evaluate_every):
        evaluate(done, state, context)
    is_stopped = context.signals.reached(done)
    if is_last or is_stopped or is_due(done, config.checkpoint_every):
        context.bad_steps.read()
        check_finite(state, done)
        save(done, state, context)
    if is_stopped:
        raise context.signals.stopped(done)


def is_due(done: int, every: int) -> bool:
    """Returns True after every `every` steps; never if `every` is 0."""
    return every > 0 and done % every == 0


def evaluate(done: int, state: TrainState, context: Context) -> None:
    """Evaluates the model during the run, unless the evaluation of this step was written."""
    context.watchdog.begin("evaluation")
    variables = gather_variables(context.mesh, state)
    metrics = context.metrics
    if metrics and not metrics.has_evaluation(done):
        # A signal ends the evaluation, and then the run after a step that all hosts agree on.
        with contextlib.suppress(Stopped), context.signals.interruptible():
            evaluation, _ = context.run_task.evaluate(variables, context.eval_split)
            metrics.log_evaluation(done, evaluation)


@contextlib.contextmanager
def log_compilation() -> Iterator[None]:
    """Logs that the first step of a stage is compiled, and how long that took."""
    log.info("compiling the step ...")
    start = time.perf_counter()
    yield
    log.info("compiled in %.1f s", time.perf_counter() - start)


def save(done: int, state: TrainState, context: Context) -> None:
    """Starts to save a checkpoint.

    Raises:
      FileNotFoundError: If the workdir was removed.
    """
    if is_lead_host() and not (context.remote.folder / "config.json").exists():
        raise FileNotFoundError(f"{context.remote.address} was removed while the run went on")
    context.watchdog.begin("save")
    context.remote.push()
    context.checkpoints.save(done, state)


def peak_step_seconds(config: TrainConfig, task: Task, mesh: Mesh) -> float | None:
    """Returns the seconds per step at peak FLOP/s for the reference's operation count.

    Returns None if the peak of the devices or the operation count is unknown.
    """
    devices = mesh.devices.flatten()
    peak = peak_flops(devices[0].device_kind)
    if peak is None or task.flops is None:
        return None
    return config.batch_size * task.flops / peak / len(devices)


def gather_variables(mesh: Mesh, state: TrainState) -> dict[str, Any]:
    """Copies the model's variables to one device of every host."""
    variables = process_allgather(mesh, {"params": state.params, "constants": state.constants})
    return jax.device_put(variables, jax.local_devices()[0])
