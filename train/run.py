"""A training run from top to bottom."""

import contextlib
import dataclasses
import logging
import math
import sys
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import sam_jax
from sam_jax.data.open import Subset
from sam_jax.model.sam import Sam
from train.bad_samples import BadSamples
from train.checkpoints import MAX_TO_KEEP, Checkpoints
from train.config import TrainConfig
from train.data import make_loader, open_data
from train.divergence import BadSteps
from train.mask_summary import print_mask_summary
from train.metrics import Metrics
from train.optimizer import check_trainable, keep_schedule, make_optimizer
from train.peers import leave, wait_for_all_hosts, watch_peers
from train.preemption import StopSignals
from train.remote_workdir import RemoteWorkdir
from train.run_record import describe_data
from train.sharding import (
    broadcast_from_lead_host,
    infer_sharding,
    init_sharded,
    make_mesh,
)
from train.stage import Context, gather_variables, train_stage
from train.state import TrainState, init_state
from train.summary import describe_run, format_summary, write_summary
from train.tasks.base import Task, make_task
from train.watchdog import Watchdog
from train.workdir import (
    check_or_create,
    is_lead_host,
    lock,
    per_host_name,
    write_evaluation,
)

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
        wait_for_all_hosts("start of the training")
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
    if done > config.num_steps:
        log.info("this is more than num_steps=%d: only the evaluation remains", config.num_steps)

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


def bytes_on_disk(variables: dict[str, Any], is_remote: bool) -> int:
    """Returns the number of bytes that a run writes: weights, and checkpoints if it is local.

    A checkpoint holds the parameters and the optimizer's two moments. While one is being written,
    there is one more than the manager keeps.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(variables))
    return size if is_remote else (3 * (MAX_TO_KEEP + 1) + 1) * size
