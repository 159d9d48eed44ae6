"""python -m neva_jax.train: one whole run, from a configuration to checkpoints."""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging

from neva_jax.checks import check, check_mesh, check_ranges
from neva_jax.compile_cache import use_compile_cache
from neva_jax.config import COMPONENTS, Config, ProfileConfig
from neva_jax.configfile import load_config, to_yaml
from neva_jax.data.bad_rows import BadRowCount
from neva_jax.data.chat_template import with_chat_template
from neva_jax.data.encoding import conversation_encoder
from neva_jax.data.pipeline import SampleMaker, Share, batches, plan_rows
from neva_jax.data.sources import Sources
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.data.watch import Watched
from neva_jax.derived import derived_comment, frozen_components, parse_mesh_shape, trained_components
from neva_jax.errors import CommandParser, RunError, UserError, WorkerError, exit_with
from neva_jax.models import attention
from neva_jax.parallel.compiler import compiler_options
from neva_jax.parallel.mesh import make_mesh, own_rows, place_batch, replicated
from neva_jax.parallel.peers import ALONE, Peers
from neva_jax.parallel.processes import add_process_arguments, connected, same_configuration
from neva_jax.precision import fp8_recipe
from neva_jax.precision.policy import compute_dtype
from neva_jax.training import ema
from neva_jax.training.ahead import CompiledAhead, configured_step, step_shapes
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta, available_components, newest_step, read_data, read_meta
from neva_jax.training.disk import probe
from neva_jax.training.guard import Guard, Rollback, guard_state
from neva_jax.training.host_memory import Reservation, allow_large_saves
from neva_jax.training.meter import Meter, seconds_since_start
from neva_jax.training.metrics import RunLog, SilentLog, check_loggers, count_bad_rows
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.out_of_memory import is_out_of_memory, out_of_memory
from neva_jax.training.profiling import Trace
from neva_jax.training.resume import changes, resumed_fp8_state, resumed_meta, resumed_samples, tidied
from neva_jax.training.retention import SaveTimes
from neva_jax.training.run_lock import RunLock
from neva_jax.training.setup import (
    abstract_optimizer,
    abstract_parameters,
    initial_fp8_state,
    initialise_optimizer,
    initialise_parameters,
    load_parameters,
    place_updates,
    saved_components,
    starting_weights,
    verify_sources,
    with_vocabulary,
)
from neva_jax.training.shortcuts import compute_prefix, prefix_tokens, whole_graphdef
from neva_jax.training.signals import StopRequest
from neva_jax.training.step import TrainState, make_eval_step
from neva_jax.training.validation import Validation
from neva_jax.training.watchdog import Watchdog
from neva_jax.training.weights import load_components


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs; returns the exit status."""
    parser = CommandParser(prog="python -m neva_jax.train", description="Train a vision-language model.")
    parser.add_argument("--config", metavar="FILE", help="YAML file; docs/configuration.md lists every key")
    parser.add_argument("--mesh-shape", metavar="SHAPE", help="sizes of the mesh axes, as data=2,tensor=4")
    parser.add_argument(
        "--allow-fallback",
        action="store_true",
        help="where the newest checkpoint is damaged, continue from the newest good one",
    )
    parser.add_argument(
        "--allow-changed",
        action="append",
        metavar="KEY",
        default=[],
        help="continue although this key differs from the run's; may be given several times",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the file")
    add_process_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    mesh_override = [f"mesh.shape={options.mesh_shape}"] if options.mesh_shape is not None else []
    flags = ["run.allow_fallback=true"] if options.allow_fallback else []
    if options.allow_changed:
        flags.append(f"run.allow_changed=[{', '.join(options.allow_changed)}]")
    overrides = [*options.overrides, *mesh_override, *flags]
    if options.print_config:
        config = load_config(options.config, overrides)
        check_ranges(config)
        print(to_yaml(config) + derived_comment(config), end="")
        return 0
    allow_large_saves()
    with connected(options) as peers:
        config = load_config(options.config, overrides)
        check(config)
        try:
            with RunLock(config.run.dir) if peers.first else nullcontext() as lock:
                return run(config, lock, peers)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(config, error) from None


def run(config: Config, lock: RunLock | None, peers: Peers = ALONE) -> int:
    """Trains until `train.steps`, or until a signal asks to stop; returns the exit status. `lock`: of `run.dir`.

    Several processes (`peers`) run this alike, and each reads its rows of a batch; the first alone writes and prints.

    Raises:
      UserError: configuration, data or checkpoint cannot be used.
      RunError, WorkerError: the run had to stop.
    """
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax and Grain narrate every save otherwise

    # --- what is to be done, checked before a device holds anything
    tokenizer = Tokenizer.from_file(config.model.tokenizer)
    config = with_chat_template(with_vocabulary(config, tokenizer))
    conversation_encoder(config.data, tokenizer)  # for its errors
    same_configuration(peers, config)
    train_rows = peers.after_first(lambda: Sources(config.data, "train", config.run.seed, shuffle=True))
    validates = config.data.val or config.data.val_fraction
    open_val = partial(Sources, config.data, "val", config.run.seed, shuffle=False)
    val_rows = peers.after_first(open_val) if validates else None
    first_tokens = None
    if config.train.constant_prefix:
        row = SampleMaker(train_rows, config, tokenizer)(0)  # the run's first: the same when it is resumed
        first_tokens = prefix_tokens(row, config.train.constant_prefix)
    use_compile_cache(config.run.compile_cache)
    sizes = parse_mesh_shape(config.mesh.shape, jax.device_count())
    accumulate = check_mesh(config, sizes)
    mesh = make_mesh(sizes)
    graphdef, abstract = abstract_parameters(config, mesh)
    trained, frozen = trained_components(config.model), frozen_components(config.model)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    abstract_trained = {name: abstract[name] for name in trained}
    abstract_moments = abstract_optimizer(optimizer, abstract_trained, mesh, config.mesh.zero1)
    optimizer, apply_updates = place_updates(optimizer, abstract_trained, config.mesh.zero1)
    run_dir = Path(config.run.dir)
    said = tidied(run_dir)
    row_counts = [train_rows.rows_in(i) for i in range(len(train_rows.files))]
    resumed = resumed_meta(config, tokenizer, run_dir, row_counts, said.append)
    start = 0 if resumed is None else resumed.step
    peers.agree(start, f"the newest checkpoint of run.dir={run_dir}, which must be a folder that all processes share")
    if resumed is None:
        contents, base = saved_components(config)
        sources = starting_weights(config)
    else:
        contents, base = resumed.components, resumed.base
        sources = available_components(run_dir / "checkpoints" / str(start))
    # Weights that checkpoints hold cannot be held in FP8 alone.
    quantize_frozen = "llm" not in contents
    if not quantize_frozen:
        graphdef, abstract = abstract_parameters(config, mesh, quantize_frozen)
    check_loggers(config.log)
    if start >= config.train.steps:
        if peers.first:
            print(f"{run_dir}: complete, step {start} of train.steps={config.train.steps}", file=sys.stderr)
        return 0
    averaged = abstract_trained if config.optimizer.ema_decay is not None else {}
    step_dir = run_dir / "checkpoints" / str(start)  # it is verified already
    others = {name: path for name, path in sources.items() if path != step_dir}
    stored = {name: abstract[name] for name in contents}, abstract_moments, averaged
    if peers.first:
        probe(run_dir, stored)
        verify_sources(others, config.checkpoint.verify, said.append)
    if resumed is None and peers.first:
        _write_config(run_dir, config)
    # Measuring may take minutes, and a signal ends it at once: nothing is there yet to be saved.
    plan = partial(plan_rows, config=config, tokenizer=tokenizer, say=said.append)
    plans = peers.after_first(lambda: plan(train_rows, name="training"))
    val_plans = None if val_rows is None else peers.after_first(lambda: plan(val_rows, name="validation"))
    share = Share(*own_rows(mesh, config.train.global_batch, accumulate), peers)
    seen = [None if one is None else [one.sources.epoch_size, one.digest] for one in (plans, val_plans)]
    peers.agree([train_rows.epoch_size, *seen], "samples of an epoch and plans of their rows (data.train, data.val)")

    with (
        StopRequest() as stop,
        Reservation(stored) as reservation,
        Checkpoints.of(config) as checkpoints,
        jax.set_mesh(mesh),
        RunLog(config.log, run_dir, start, config.train.steps, config) if peers.first else SilentLog() as log,
        Trace(config.profile if peers.first else ProfileConfig(), run_dir, log.say) as trace,
    ):
        # --- the rows, which workers make while the state is read
        progress = {"samples": 0} if resumed is None else read_data(step_dir)
        samples = resumed_samples(progress, plans, train_rows)

        def stream_after(step: int) -> Watched:
            left = (config.train.steps - step) * config.train.global_batch
            return batches(train_rows, config, tokenizer, samples, left, plans, share)

        stream = stream_after(start)
        known_bad = peers.exchange(log.bad_rows)[0]
        bad_rows = BadRowCount(train_rows, config.data, "train", known_bad)

        # --- the step, which is compiled meanwhile
        options = compiler_options(config, mesh.shape["fsdp"])
        whole = whole_graphdef(config, mesh, quantize_frozen)
        shapes = step_shapes(config, mesh, abstract, abstract_moments, accumulate)
        train_step = configured_step(config, graphdef, optimizer, apply_updates, shapes[0], options, whole)

        def unwanted() -> bool:
            # Other processes would wait for this one's share of the timing of kernels.
            return stop.signal is not None and jax.process_count() == 1

        def may_compile() -> bool:
            reservation.wait(unless=lambda: stop.signal is not None)
            return not unwanted()

        ahead = CompiledAhead(train_step, mesh, shapes, may_compile)

        # --- state: resumed, or fresh
        if resumed is None:
            params = initialise_parameters(config, abstract, sources, log.say)
            moments = initialise_optimizer(optimizer, {name: params[name] for name in trained}, abstract_moments)
        else:
            params, moments = checkpoints.restore(start, {name: abstract[name] for name in contents}, abstract_moments)
            elsewhere = {name: abstract[name] for name in COMPONENTS if name not in contents}
            params |= load_parameters(config, elsewhere, sources)
            log.say(f"resumed from step {start}")
            for name, (before, now) in changes(resumed.config, config).items():
                log.say(f"changed since then: {name}={now}, was {before}")

        def state_of(params: dict, moments: Any, progress: dict[str, Any], saved: Meta | None) -> TrainState:
            """The state after the step that `saved` is of; None: of a fresh run."""
            step = 0 if saved is None else saved.step
            counted = guard_state(config.guard, progress.get("guard"))
            numbers = jax.device_put((np.int32(step), counted), replicated(mesh))
            trained_params = {name: params[name] for name in trained}
            if averaged and saved is not None and saved.ema:
                saved_in = run_dir / "checkpoints" / str(step)
                average = load_components(averaged, dict.fromkeys(trained, saved_in), averaged=saved_in)
            else:
                average = ema.start(trained_params, config.optimizer.ema_decay)
            fp8_state = initial_fp8_state(config, mesh)
            if fp8_state and saved is not None:
                fp8_state = resumed_fp8_state(checkpoints, step, saved.config, config, fp8_state, log.say)
            return TrainState(numbers[0], trained_params, moments, numbers[1], average, fp8_state)

        state = state_of(params, moments, progress, resumed)
        frozen_params = {name: params[name] for name in frozen}
        prefix = None
        if first_tokens is not None:
            prefix = compute_prefix(config, mesh, params, first_tokens, quantize_frozen)
        del params, moments
        log.say(_summary(config, sizes, accumulate, abstract, train_rows))
        log.say(attention.describe(config.model, compute_dtype(config.precision), config.data.pack, mesh.size))
        if config.precision.compute.startswith("fp8"):
            log.say(fp8_recipe.describe(config, mesh.size, config.precision.fp8.quantize_frozen and quantize_frozen))

        # --- what goes on beside the steps
        for line in said:
            log.say(line)
        if resumed is not None and peers.first:
            _write_config(run_dir, config)  # not before it may go on
        guard = Guard(config.guard, train_rows, log.say, log.skipped_step, progress.get("guard"))
        validation = None
        if val_rows is not None:
            validation = Validation(
                make_eval_step(
                    graphdef if whole is None else whole, config.train.loss_chunk, config.data.pack, options
                ),
                val_rows,
                val_plans,
                BadRowCount(val_rows, config.data, "val", known_bad),
                config,
                tokenizer,
                accumulate,
                share,
                log,
            )
        lengths_seen: set[int] = set()
        meter, saved, done = Meter(), start, start  # the last step that is saved, and that is done
        save_times = SaveTimes(config.checkpoint.every, config.checkpoint.every_minutes, config.log.every)
        # What was validated after it was saved is known from the log alone.
        logged = peers.exchange(log.values("val_loss"))[0]
        val_losses = {int(at): loss for at, loss in [*progress.get("val_losses", {}).items(), *logged.items()]}

        def validate_now(step: int) -> None:
            loss = validation.run(step, state, frozen_params, mesh, watchdog)
            log.metrics({"step": step, "val_loss": loss})
            val_losses[step] = loss

        def validation_due(step: int) -> bool:
            return validation is not None and (step % config.eval.every == 0 or step == config.train.steps)

        def save_now(step: int) -> None:
            everything = {**frozen_params, **state.trained}
            data = {"samples": samples, "plan": None if plans is None else plans.digest}
            save_times.saved()
            checkpoints.save(
                step,
                {name: everything[name] for name in contents},
                state.optimizer,
                data | {"guard": guard.saved(state.guard), "rows": row_counts, "val_losses": val_losses},
                Meta(step, config, contents, base, tokenizer, bool(averaged)),
                state.ema,
                state.fp8,
            )

        def save_if_possible() -> str:
            """When the run must end between two steps: nothing that is done gets lost. Returns what it did."""
            if jax.process_count() > 1 or int(state.step) != done:
                return f"not possible now; the last checkpoint is that of step {saved}"
            if done > saved and guard.look(saved) is None:
                save_now(done)
                checkpoints.wait()
            return f"all is saved up to step {done}"

        def roll_back(to: Rollback) -> int:
            """Takes the newest checkpoint, and the rows after the bad ones; returns its step."""
            nonlocal state, samples, stream, meter
            checkpoints.wait()
            step = peers.after_first(lambda: newest_step(checkpoints.directory))
            if step is None:
                raise RunError(f"no checkpoint to go back to from step {to.step}; a smaller checkpoint.every makes one")
            state = None  # never two of them
            params, moments = checkpoints.restore(step, abstract_trained, abstract_moments)
            step_dir = checkpoints.directory / str(step)
            state = state_of(params, moments, read_data(step_dir), read_meta(step_dir))
            samples = to.samples
            for at in [at for at in val_losses if at > step]:
                del val_losses[at]
            guard.skipped = int(state.guard.skipped)
            stream, meter = stream_after(step), Meter()
            log.rewind(step)
            log.say(f"back to step {step}; its next rows are those after step {to.step}")
            return step

        watch = Watchdog(config.guard.step_timeout, run_dir / "log.txt", lambda: stream.state(), save_if_possible)
        with watch as watchdog:
            watchdog.alive("the step is compiled")
            while ahead.is_alive() and not unwanted():
                ahead.join(0.1)
            if reservation.said:
                log.say(reservation.said)
            # The run may have been killed between saving and validating.
            if start > 0 and validation_due(start) and start not in val_losses:
                validate_now(start)
            if stop.agreed(peers):
                log.say(f"stopped by {stop.name} before step {start + 1}; the same command continues")
                return stop.status

            # --- the loop
            step = start
            while step < config.train.steps:
                step += 1
                trace.before(step, state)
                watchdog.alive(f"step {step} waits for its batch")
                try:
                    batch = meter.next(stream)
                    count_bad_rows(batch, bad_rows, log, step)
                except (UserError, WorkerError):
                    log.say(save_if_possible())
                    raise
                rows_of_batch = partial(map, train_rows.describe, batch.refs)
                watchdog.goes_on(f"step {step} is computed", rows_of_batch)
                length = batch.arrays["tokens"].shape[1]
                first, first_of_length = not lengths_seen, length not in lengths_seen
                if first_of_length and length != config.data.max_length:  # that one was compiled ahead
                    log.say(f"step {step}: the first batch of {length} tokens; compiling")
                lengths_seen.add(length)
                timed = not first_of_length or config.log.every == 1  # one that compiles says nothing of the speed
                with (
                    nullcontext() if timed else meter.paused(state),
                    jax.profiler.StepTraceAnnotation("train", step_num=step),
                ):
                    began = time.monotonic()
                    arrays = place_batch(mesh, batch.arrays, accumulate)
                    state, metrics = train_step(state, frozen_params, arrays, prefix)
                    if first_of_length:
                        jax.block_until_ready(metrics)
                guard.add(step, batch, metrics)
                samples, done = batch.consumed, step
                if timed:
                    meter.count(batch)
                elif step == start + 1:
                    meter = Meter()  # nor does the wait for the first batch
                if first:
                    if ahead.error is not None:
                        log.say(f"the step could not be compiled ahead, but when it was called ({ahead.error!r})")
                    itself = time.monotonic() - began
                    log.say(
                        f"step {step}: the first, {seconds_since_start():.1f} s after the start; itself {itself:.1f} s"
                    )
                log.advance()
                for line in checkpoints.news():
                    log.say(line)
                if lock is not None and lock.lost is not None:
                    raise RunError(f"{lock.lost}; stopped after step {step}")
                # Asked once: what is saved and what is said must agree. A signal that comes later stops the next step.
                stopping, final = stop.reached(step, peers), step == config.train.steps
                last = final or stopping
                saving, logging = last or save_times.due(step), last or step % config.log.every == 0
                if saving or logging or guard.full:
                    if (rollback := guard.look(saved)) is not None:
                        watchdog.alive("rolling back")
                        step = saved = done = roll_back(rollback)
                        continue
                    # Parameters that bad steps follow may be the reason: a rollback must not find them.
                    saving = saving and (last or guard.in_row == 0)
                if logging:
                    wanted = ("loss", "lr", "grad_norm", "short")
                    numbers = {name: float(metrics[name]) for name in wanted if name in metrics}
                    epoch = samples / train_rows.epoch_size
                    log.metrics({"step": step, **numbers, **meter.row(), "epoch": epoch, **guard.counts()})
                    meter = Meter()
                if saving and not final:
                    watchdog.alive(f"step {step} is saved")
                    with meter.paused(state):
                        save_now(step)
                        saved = step
                if stopping and not final:
                    break
                if validation_due(step):
                    with meter.paused(state):
                        validate_now(step)
                if final:
                    watchdog.alive(f"step {step} is saved")
                    save_now(step)  # last of all: a run that has its last step is complete
            checkpoints.wait()
            for line in checkpoints.news():
                log.say(line)
        if step < config.train.steps:
            log.say(f"stopped by {stop.name} after step {step}, saved; the same command continues")
            return stop.status
        if bad_rows.counts:
            log.say(f"{bad_rows.summary()}; bad_rows.jsonl lists them")
        log.say(f"done: step {step}, checkpoint in {checkpoints.directory / str(step)}")
    return 0


def _write_config(run_dir: Path, config: Config) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.dir={run_dir}: cannot be written to ({error.strerror})") from None


def _summary(config: Config, sizes: dict[str, int], accumulate: int, abstract: dict, rows: Sources) -> str:
    def millions(names: tuple[str, ...]) -> str:
        return f"{sum(leaf.size for name in names for leaf in jax.tree.leaves(abstract[name])) / 1e6:.2f}M"

    trained, frozen = trained_components(config.model), frozen_components(config.model)
    mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    return (
        f"training {'+'.join(trained)} ({millions(trained)}), "
        f"frozen {'+'.join(frozen) or 'nothing'} ({millions(frozen)}); "
        f"{rows.row_count} rows, {config.train.global_batch} per step in {accumulate} micro batches; "
        f"mesh {mesh} on {jax.devices()[0].device_kind}; {config.precision.compute}"
    )


if __name__ == "__main__":
    exit_with(main)
