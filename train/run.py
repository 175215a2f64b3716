"""A training run from top to bottom."""

import contextlib
import dataclasses
import functools
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import sam_jax
from sam_jax.data.example import SourceError
from sam_jax.data.loader import Loader
from sam_jax.data.open import Subset, exclude, open_source, select, with_full_size
from sam_jax.data.sources.mixed import Mixture
from sam_jax.model.sam import Sam
from train.checkpoints import MAX_TO_KEEP, Checkpoints
from train.config import TrainConfig
from train.divergence import BadSteps, check_finite
from train.flops import peak_flops
from train.mask_summary import print_mask_summary
from train.metrics import Metrics, summarize
from train.optimizer import check_trainable, keep_schedule, make_optimizer
from train.peers import leave, meet, watch_peers
from train.preemption import Stopped, StopSignals
from train.remote_workdir import RemoteWorkdir
from train.run_record import describe_data
from train.sharding import (
    broadcast_from_lead_host,
    infer_sharding,
    init_sharded,
    make_mesh,
    process_allgather,
    shard_batch,
)
from train.state import TrainState, init_state
from train.step import make_step
from train.summary import describe_run, format_summary, write_summary
from train.tasks.base import Task, make_task
from train.watchdog import Watchdog
from train.workdir import BadSamples, check_or_create, lock, write_evaluation

log = logging.getLogger("train")


def run(config: TrainConfig, workdir: str | Path, signals: StopSignals | None = None) -> None:
    """Trains, or resumes the run in the workdir; then evaluates and reports.

    Afterwards the workdir holds config.json, summary.json, metrics.jsonl, tensorboard/,
    checkpoints/, weights/ (for `sam_jax.load`), evaluation.json, objects.jsonl and report/; also
    bad_samples.jsonl and profile/ if there were any. It may be in an object store (gs://...), see
    `remote_workdir.py`.

    Progress is logged to the logger "train" at the level INFO.

    On several hosts, each host reads its share of every batch and saves its shards of the
    checkpoints. The variables are gathered on all hosts for evaluations. The lead host evaluates
    and does all other writing while the others wait.

    Args:
      config: The run.
      workdir: A new folder, or that of a run with the same configuration.
      signals: The signals that stop the run; by default, none do on a single host.

    Raises:
      ConfigError: If the run is not possible. Nothing is written then.
      SourceError: If the images cannot be opened. Nothing is written then.
      DivergedError: If too many steps in a row are bad. No weights are written then.
      OSError: If something else than metrics cannot be written.
      Stopped: If a signal stops the run.
    """
    signals = signals or StopSignals()
    # The task, the images, the devices and the initial variables.
    task = make_task(config)
    train_split, eval_split = open_data(config, task)
    stages = config.parts()
    mesh = make_mesh(math.gcd(*(stage.batch_size for _, _, stage in stages)), config.fsdp)
    variables = task.initial_variables(train_split)
    for _, _, stage in stages:
        make_task(stage)  # raises ConfigError if the stage is not possible
        check_trainable(variables["params"], stage.trainable)

    with RemoteWorkdir(workdir) as remote, contextlib.ExitStack() as stack:
        remote.pull()
        num_bytes = bytes_on_disk(variables, remote.is_remote)
        if is_lead_host():
            hold = lock(remote.folder, config, num_bytes, remote.address, remote.checkpoints)
            stack.enter_context(hold)
        check_or_create(
            remote.folder, config, num_bytes, is_lead_host(), remote.address, remote.checkpoints
        )
        if is_lead_host():
            summary = describe_run(
                config, mesh, variables["params"], train_split, eval_split, remote.address
            )
            print(format_summary(summary), flush=True)
            write_summary(remote.folder, summary)
            if isinstance(config.model, Sam):
                print_mask_summary(config.model, make_loader(config, task, train_split))
        remote.push()
        meet("start of the training")
        state = train_loop(config, task, remote, mesh, variables, train_split, eval_split, signals)
        variables = gather_variables(mesh, state)
        failure: BaseException | None = None
        if is_lead_host():
            try:
                with signals.interruptible():
                    finalize(config, task, remote.folder, variables, eval_split)
            except BaseException as error:
                failure = error
        # The other hosts end with the lead host, which tells them how.
        exit_code = broadcast_from_lead_host(
            getattr(failure, "exit_code", int(failure is not None))
        )
        if failure:
            raise failure
    if exit_code:
        sys.exit(exit_code)
    if is_lead_host():
        print(f"report: {remote.address}/report/index.html")
        print(f"weights: {remote.address}/weights")


def train_loop(
    config: TrainConfig,
    task: Task,
    remote: RemoteWorkdir,
    mesh: Mesh,
    variables: dict[str, Any],
    train_split: Subset,
    eval_split: Subset,
    signals: StopSignals,
) -> TrainState:
    """Trains from the newest checkpoint, or from the given variables.

    Args:
      config: The run.
      task: Its task.
      remote: Its workdir.
      mesh: Its devices.
      variables: The variables to start from.
      train_split: The images to train on.
      eval_split: The images to evaluate on.
      signals: The signals that stop the run.

    Returns:
      The last state.

    Raises:
      DivergedError: If too many steps in a row are bad.
      Stopped: If a signal stops the run. A checkpoint of the last step was saved.
    """
    stages = config.parts()
    optimizers = [
        make_optimizer(config.optimizer, task.encoder_depth, stage.trainable)
        for _, _, stage in stages
    ]

    def make_state(step: int) -> TrainState:
        # A checkpoint at the border of two stages was written by the first of them. It may be of a
        # stage after `num_steps`, if that was larger before.
        longer = dataclasses.replace(config, num_steps=max(config.num_steps, step))
        trainable = next(part.trainable for _, stop, part in longer.parts() if step <= stop)
        optimizer = make_optimizer(config.optimizer, task.encoder_depth, trainable)
        return init_sharded(mesh, lambda v: init_state(v, optimizer), variables)

    data = describe_data(train_split, eval_split)
    checkpoints = Checkpoints(remote.checkpoints, mesh, config, data)
    state = checkpoints.restore(make_state) or make_state(0)
    done = int(state.step)
    if done:
        log.info("resuming from step %d", done)

    folder = remote.folder
    bad_samples = BadSamples(
        folder / per_host_name("bad_samples.jsonl"), config.data.max_bad, len(train_split)
    )
    metrics = Metrics(folder, done, config.num_steps) if is_lead_host() else None
    watchdog = Watchdog(folder / per_host_name("stacks.txt"), leave)
    context = Context(
        run_task=task,
        mesh=mesh,
        remote=remote,
        checkpoints=checkpoints,
        metrics=metrics,
        bad_samples=bad_samples,
        bad_steps=BadSteps(config.max_bad_steps),
        watchdog=watchdog,
        train_split=train_split,
        eval_split=eval_split,
        signals=signals,
    )
    trainable = stages[0][2].trainable
    with signals.deferred(), watch_peers(), watchdog, contextlib.ExitStack() as stack:
        if metrics:
            stack.callback(metrics.close)
        stack.callback(checkpoints.close)
        for (start, stop, stage), optimizer in zip(stages, optimizers, strict=True):
            if done == start and stage.trainable != trainable:
                state = change_optimizer(mesh, state, optimizer)
            trainable = stage.trainable
            if done < stop:
                state = train_stage(stage, optimizer, state, done, stop, context)
                done = stop
        watchdog.begin("save")
    return state


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
      context: What the stages share.

    Returns:
      The last state.
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

    def is_due(done: int, every: int) -> bool:
        return every > 0 and done % every == 0

    def evaluate(done: int, state: TrainState) -> None:
        watchdog.begin("evaluation")
        variables = gather_variables(mesh, state)
        if metrics and not metrics.has_evaluation(done):
            # A signal ends the evaluation, and then the run after a step that all hosts agree on.
            with contextlib.suppress(Stopped), context.signals.interruptible():
                metrics.log_evaluation(
                    done, context.run_task.evaluate(variables, context.eval_split)[0]
                )

    if start and is_due(start, config.evaluate_every):
        evaluate(start, state)  # unless it was evaluated before the run was stopped
    loaded = loader.batches(start, stop, config.data.workers)
    watchdog.describe = loaded.describe
    with contextlib.closing(loaded):
        batches = metrics.timed(loaded) if metrics else loaded
        for done, (batch, skipped) in enumerate(batches, start=start + 1):
            context.bad_samples.add(skipped)
            if metrics and done in config.profile[:1]:
                jax.profiler.start_trace(context.remote.folder / "profile")
            batch = batch_transform(batch)
            compilation = log_compilation() if done == start + 1 else contextlib.nullcontext()
            with compilation, jax.transfer_guard("disallow"):
                state, values = step(state, shard_batch(mesh, batch))
            context.bad_steps.add(done, values.pop("is_finite"))
            watchdog.advance(values["loss"])
            if metrics and done in config.profile[1:]:
                jax.block_until_ready(values)
                jax.profiler.stop_trace()
            if metrics:
                metrics.advance()
            # Everything is due by step and never by the clock, so that all hosts do it together.
            is_last = done == config.num_steps
            if is_last or is_due(done, config.log_every):
                context.bad_steps.read()
                if metrics:
                    row = summarize(jax.device_get(values))
                    metrics.log(done, row | {"bad_steps": context.bad_steps.take_count()})
            if not is_last and is_due(done, config.evaluate_every):
                evaluate(done, state)
            is_stopped = context.signals.reached(done)
            if is_last or is_stopped or is_due(done, config.checkpoint_every):
                context.bad_steps.read()
                check_finite(state, done)
                save(done, state, context)
            if is_stopped:
                raise context.signals.stopped(done)
    return state


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


def change_optimizer(
    mesh: Mesh, state: TrainState, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state for an optimizer that trains other parts; see `keep_schedule`."""
    sharding = infer_sharding(mesh, jax.eval_shape(optimizer.init, state.params))
    opt_state = jax.jit(optimizer.init, out_shardings=sharding)(state.params)
    return dataclasses.replace(state, opt_state=keep_schedule(state.opt_state, opt_state))


def finalize(
    config: TrainConfig,
    task: Task,
    workdir: Path,
    variables: dict[str, Any],
    eval_split: Subset,
) -> None:
    """Saves the weights, evaluates them, and writes the report."""
    sam_jax.save(workdir / "weights", task.trained_model, variables)
    where = {"source": config.data.source, "index": config.data.held_out or ":"}
    scores, objects = task.evaluate(variables, eval_split)
    evaluation = where | scores
    write_evaluation(workdir, evaluation, objects)
    task.report(workdir, variables, eval_split, evaluation)


def open_data(config: TrainConfig, task: Task) -> tuple[Subset, Subset]:
    """Opens the images.

    Args:
      config: The run.
      task: Its task.

    Returns:
      The images to train on, and those to evaluate on, which are always decoded in full. They are
      the same if no images are held out.

    Raises:
      SourceError: If the images cannot be opened.
    """
    source = open_source(config.data.source, decode_size=task.decode_size, masks=task.needs_masks)
    full_size = with_full_size(source)
    if not config.data.held_out:
        return select(source, ":"), select(full_size, ":")
    eval_split = select(full_size, config.data.held_out)
    return without_copies(exclude(source, config.data.held_out), eval_split), eval_split


def without_copies(train_split: Subset, eval_split: Subset) -> Subset:
    """Removes other copies of held-out images, which a mixture may contain, from the training."""
    if not isinstance(train_split.source, Mixture):
        return train_split
    held_out = {eval_split.name(i) for i in range(len(eval_split))}
    is_copy = [train_split.name(i) in held_out for i in range(len(train_split))]
    if all(is_copy):
        raise SourceError("data.held_out leaves no image to train on")
    return dataclasses.replace(train_split, indices=train_split.indices[~np.array(is_copy)])


def make_loader(config: TrainConfig, task: Task, split: Subset) -> Loader:
    """Makes the loader of this host's rows of the batches."""
    return Loader(
        source=split.source,
        indices=split.indices,
        transform=task.transform,
        batch_size=config.batch_size,
        seed=config.seed,
        views=getattr(config.data, "views", 0),
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def peak_step_seconds(config: TrainConfig, task: Task, mesh: Mesh) -> float | None:
    """Returns the seconds per step at peak FLOP/s for the reference's operation count.

    Returns None if the peak of the devices or the operation count is unknown.
    """
    devices = mesh.devices.flatten()
    peak = peak_flops(devices[0].device_kind)
    if peak is None or task.flops is None:
        return None
    return config.batch_size * task.flops / peak / len(devices)


def bytes_on_disk(variables: dict[str, Any], is_remote: bool) -> int:
    """Returns the number of bytes that a run writes: weights, and checkpoints if it is local.

    A checkpoint holds the parameters and the optimizer's two moments. While one is being written,
    there is one more than the manager keeps.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(variables))
    return size if is_remote else (3 * (MAX_TO_KEEP + 1) + 1) * size


def gather_variables(mesh: Mesh, state: TrainState) -> dict[str, Any]:
    """Copies the model's variables to one device of every host."""
    variables = process_allgather(mesh, {"params": state.params, "constants": state.constants})
    return jax.device_put(variables, jax.local_devices()[0])


def is_lead_host() -> bool:
    """Returns True on the host that writes."""
    return jax.process_index() == 0


def per_host_name(name: str) -> str:
    """Inserts the process index into a file name, except on the lead host."""
    path = Path(name)
    return f"{path.stem}_{jax.process_index()}{path.suffix}" if jax.process_index() else name
