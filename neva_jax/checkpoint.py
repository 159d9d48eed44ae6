"""python -m neva_jax.checkpoint: what checkpoints a run has, whether they are whole, and which may go."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging as absl_logging
from tqdm import tqdm

from neva_jax.errors import CommandParser, UserError, exit_with
from neva_jax.files import readable
from neva_jax.training.disk import reason
from neva_jax.training.manifest import size_of
from neva_jax.training.overview import examine, list_lines, show_lines, step_dirs, val_losses
from neva_jax.training.retention import Retention, remove


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and answers; returns the exit status."""
    parser = CommandParser(prog="python -m neva_jax.checkpoint", description="Look after the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__.splitlines()[0])
        command.add_argument("--run", required=True, metavar="DIR", help="a run, or a step in its checkpoints/")
        if name in ("verify", "show"):
            default = "all of them" if name == "verify" else "the newest"
            command.add_argument("--step", type=int, metavar="N", help=f"one checkpoint; without it, {default}")
        if name == "prune":
            command.add_argument("--keep", type=int, required=True, metavar="N", help="the newest that stay")
            command.add_argument("--keep-every", type=int, metavar="N", help="multiples of this step stay too")
            command.add_argument(
                "--keep-best", type=int, default=0, metavar="N", help="the smallest val_losses stay too"
            )
            command.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")
    options = parser.parse_args(arguments)
    absl_logging.set_verbosity(absl_logging.ERROR)
    dirs = step_dirs(Path(options.run))
    if getattr(options, "step", None) is not None:
        there = [step_dir.name for step_dir in dirs]
        dirs = [step_dir for step_dir in dirs if step_dir.name == str(options.step)]
        if not dirs:
            raise UserError(f"--step {options.step}: {options.run} has the steps {', '.join(there)}")
    return COMMANDS[options.command](options, dirs)


def _list(options, dirs: list[Path]) -> int:
    """A row for each checkpoint: size, val_loss, whether its files are all there, what it resumes."""
    print("\n".join(list_lines(dirs)))
    return 0


def _show(options, dirs: list[Path]) -> int:
    """All that one checkpoint says of itself."""
    print("\n".join(show_lines(dirs[-1])))
    return 0


def _verify(options, dirs: list[Path]) -> int:
    """Compares every file with the digests that were taken when it was saved."""
    total = sum(map(size_of, dirs))
    damaged = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=None) as bar:
        for step_dir in dirs:
            finding = examine(step_dir, "full", bar.update)
            bar.clear()
            print(f"{step_dir.name}  {finding.state}{f'  {finding.reason}' if finding.reason else ''}", flush=True)
            if finding.state == "damaged":
                damaged.append(step_dir.name)
    if damaged:
        raise UserError(
            f"{options.run}: damaged: {', '.join(damaged)}; restore the named files from a copy, or move the "
            f"step{'s' if damaged[1:] else ''} away (train --allow-fallback does, and goes on from a good one)"
        )
    return 0


def _prune(options, dirs: list[Path]) -> int:
    """Deletes checkpoints but the newest, those that are asked for, and never the only good one."""
    if options.keep < 1:
        raise UserError(f"--keep {options.keep}: must be at least 1")
    for flag, value, least in (("--keep-every", options.keep_every, 1), ("--keep-best", options.keep_best, 0)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")
    if dirs[0] == Path(options.run):
        raise UserError(f"--run {options.run}: is one checkpoint; name the run that it is of")
    steps = {int(step_dir.name): step_dir for step_dir in dirs}
    stay = Retention(options.keep, options.keep_every, options.keep_best).kept(steps, val_losses(dirs))
    going = [step_dir for step, step_dir in steps.items() if step not in stay]
    if going and (finding := examine(dirs[-1], "full")).state == "damaged":
        raise UserError(f"nothing is deleted, since the newest checkpoint is damaged: {finding.reason}")
    for step_dir in going:
        size = readable(size_of(step_dir))
        if not options.dry_run:
            try:
                remove(step_dir)
            except OSError as error:
                raise UserError(f"{step_dir}: cannot be deleted ({reason(error)})") from None
        print(f"{step_dir.name}  {size}  {'would go' if options.dry_run else 'deleted'}", flush=True)
    left = ", ".join(str(step) for step in sorted(stay))
    print(f"{'would stay' if options.dry_run else 'left'}: {left}", file=sys.stderr)
    return 0


COMMANDS = {"list": _list, "verify": _verify, "show": _show, "prune": _prune}


if __name__ == "__main__":
    exit_with(main)
