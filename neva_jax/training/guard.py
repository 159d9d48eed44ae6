"""The numeric guard: steps that must not change anything, and what a run does when there are too many of them.

On the device, in the step itself, `judge` gives each step one of these verdicts; unless it is GOOD, the step leaves
parameters, optimizer and everything else that is trained as they were:

    NOT_FINITE   the loss or the gradients' norm is infinite or no number
    SPIKE        loss > median + guard.spike_factor * spread of the last guard.spike_window losses of good steps, where
                 the spread is their median absolute deviation, at least `LEAST_SPREAD` of the median. (For normal noise
                 it is 0.67 standard deviations.) Nothing is a spike before there are that many losses.
    EMPTY        no token of the batch is supervised: neither good nor bad

On the host, `Guard` reads the verdicts when the run reads its loss anyway, so no step waits for it. It names the rows
of the skipped steps in `skipped_steps.jsonl`. After `guard.max_bad_steps` bad ones in a row it ends the run, or asks
for a rollback: back to the parameters of the newest checkpoint, on with the rows *after* the bad ones. What it knows
is saved in the checkpoint's `data`, so that a resumed run decides as the uninterrupted one would have; and because a
rollback depends on the verdicts alone, a run that is killed after one repeats it.

A skipped step counts as a step of the run, but not for the schedule: learning rate and Adam's bias correction follow
the number of updates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neva_jax.config import GuardConfig
from neva_jax.data.pipeline import Batch
from neva_jax.data.sources import RowRef, Sources
from neva_jax.errors import RunError

GOOD, NOT_FINITE, SPIKE, EMPTY = range(4)
BAD = (NOT_FINITE, SPIKE)
LEAST_SPREAD = 1e-3
MOST_WAITING = 100  # steps whose verdicts are not read yet
SHOWN = 3  # rows of a skipped step that its message names

# --- on the device


class GuardState(NamedTuple):
    """What the guard carries from step to step.

    skipped: i32, steps that changed nothing; seen: i32, losses of good steps so far; losses: [W] f32, the last W of
    them, where loss n lies at n % W. W is 0 without a spike rule.
    """

    skipped: jax.Array | np.ndarray = np.int32(0)
    seen: jax.Array | np.ndarray = np.int32(0)
    losses: jax.Array | np.ndarray = np.zeros(0, np.float32)


def spike_bound(losses: jax.Array, factor: float) -> jax.Array:
    """The largest loss that is no spike after `losses` [W]."""
    median = jnp.median(losses)
    spread = jnp.maximum(jnp.median(jnp.abs(losses - median)), LEAST_SPREAD * jnp.abs(median))
    return median + factor * spread


def judge(
    guard: GuardState, loss: jax.Array, grad_norm: jax.Array, weights: jax.Array, spike_factor: float | None
) -> tuple[jax.Array, GuardState]:
    """The verdict (i32) on a step with this loss, gradient norm and sum of loss weights, and the guard after it."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    verdict = jnp.where(finite, GOOD, NOT_FINITE)
    window, losses = guard.losses.shape[0], guard.losses
    if spike_factor is not None and window:
        spike = finite & (guard.seen >= window) & (loss > spike_bound(losses, spike_factor))
        verdict = jnp.where(spike, SPIKE, verdict)
    verdict = jnp.where(weights == 0, EMPTY, verdict)
    good = verdict == GOOD
    if window:
        place = guard.seen % window
        losses = losses.at[place].set(jnp.where(good, loss, losses[place]))
    one = good.astype(jnp.int32)
    return verdict, GuardState(guard.skipped + 1 - one, guard.seen + one, losses)


# --- on the host


def guard_state(config: GuardConfig, saved: dict[str, Any] | None) -> GuardState:
    """The guard of a fresh run, or as it was `saved` (`Guard.saved`)."""
    window = config.spike_window if config.spike_factor is not None else 0
    saved = saved or {}
    losses = np.asarray(saved.get("losses", []), np.float32)
    skipped = np.int32(saved.get("skipped", 0))
    if len(losses) != window:  # a rule of another window begins anew
        return GuardState(skipped, np.int32(0), np.zeros(window, np.float32))
    return GuardState(skipped, np.int32(saved.get("seen", 0)), losses)


@dataclass(frozen=True)
class Rollback:
    """The run goes back to its newest checkpoint, and on with the samples from `samples` on."""

    step: int
    samples: int


class Guard:
    """Reads the verdicts of the steps, says what was skipped, and decides when that is too much."""

    def __init__(
        self,
        config: GuardConfig,
        rows: Sources,
        say: Callable[[str], None],
        record: Callable[[dict[str, Any]], None],
        saved: dict[str, Any] | None,
    ):
        """`record`: takes a line of `skipped_steps.jsonl`; `saved`: by a run that is resumed."""
        self.config, self.rows, self._say, self._record = config, rows, say, record
        self._waiting: list[tuple[int, list[RowRef], int, dict[str, jax.Array]]] = []
        saved = saved or {}
        self.in_row, self.rollbacks = saved.get("in_row", 0), saved.get("rollbacks", 0)
        self.skipped = saved.get("skipped", 0)

    def saved(self, state: GuardState) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON; to be asked after `look`."""
        assert not self._waiting
        skipped, seen, losses = jax.device_get(state)
        return {
            "in_row": self.in_row,
            "rollbacks": self.rollbacks,
            "skipped": int(skipped),
            "seen": int(seen),
            "losses": [float(loss) for loss in losses],
        }

    def add(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        """Remembers a step until `look`; nothing is waited for."""
        self._waiting.append((step, batch.refs, batch.consumed, metrics))
        metrics["verdict"].copy_to_host_async()

    def counts(self) -> dict[str, int]:
        """For the log: steps that were skipped, once there are some."""
        return {"skipped": self.skipped} if self.skipped else {}

    @property
    def full(self) -> bool:
        """Whether `look` is due, even if the run does not log yet."""
        return len(self._waiting) >= MOST_WAITING

    def look(self, saved: int) -> Rollback | None:
        """Reads the verdicts on the steps since the last look, which waits for the last of them.

        Args:
          saved: step of the newest checkpoint, for the message.

        Returns:
          a rollback, if there must be one. Steps after the one that decided it do not count.

        Raises:
          RunError: `guard.max_bad_steps` in a row, and no rollback is allowed (any more).
        """
        waiting, self._waiting = self._waiting, []
        for (step, refs, consumed, metrics), verdict in zip(
            waiting, jax.device_get([entry[-1]["verdict"] for entry in waiting]), strict=True
        ):
            if verdict == GOOD:
                self.in_row = 0
                continue
            self.skipped += 1
            self._tell(step, refs, int(verdict), float(metrics["loss"]), float(metrics["grad_norm"]))
            if verdict not in BAD:
                continue
            self.in_row += 1
            if self.in_row >= self.config.max_bad_steps:
                return self._enough(step, consumed, saved)
        return None

    def _tell(self, step: int, refs: list[RowRef], verdict: int, loss: float, grad_norm: float) -> None:
        names = [self.rows.describe(ref) for ref in refs]
        others = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        reason = {
            NOT_FINITE: f"loss {loss:g}, gradient norm {grad_norm:g}",
            SPIKE: f"loss {loss:g} is a spike (guard.spike_factor={self.config.spike_factor})",
            EMPTY: "nothing of its rows is supervised",
        }[verdict]
        self._say(
            f"step {step}: skipped, {reason}; its rows, listed in skipped_steps.jsonl: "
            f"{', '.join(names[:SHOWN])}{others}"
        )
        self._record({"step": step, "reason": reason, "rows": names})

    def _enough(self, step: int, consumed: int, saved: int) -> Rollback:
        bad = f"{self.in_row} bad steps in a row, the last is step {step} (guard.max_bad_steps)"
        kept = f"nothing is saved after step {saved}, from which the same command would continue"
        if self.config.on_bad == "stop":
            raise RunError(
                f"{bad}; they changed nothing, and {kept}. skipped_steps.jsonl names their rows; a lower optimizer.lr, "
                "other data, or guard.on_bad=rollback may help"
            )
        if self.rollbacks >= self.config.max_rollbacks:
            raise RunError(f"{bad}, after {self.rollbacks} rollbacks (guard.max_rollbacks); {kept}")
        self.rollbacks, self.in_row = self.rollbacks + 1, 0
        self._say(f"{bad}: rollback {self.rollbacks} of at most {self.config.max_rollbacks}")
        return Rollback(step, consumed)
