"""What can go wrong, and the exit code that scripts may rely on.

LauncherError                 1   anything of ours without a narrower class
├── ConfigError               2   a key, a value or a command line that cannot be meant
├── PlanError                 3   no legal or fitting plan; a pinned value is impossible
├── DataError                 4   corpus or tokenizer missing, empty, unreadable or too large
├── RunDirError               5   a run directory that is missing, occupied, damaged or not writable
├── CheckpointError           6   no good checkpoint where one is needed; it does not belong to this run
├── EngineError               7   an engine or an optional package is missing or refuses what was asked
├── ClusterError              8   the machine is not what the plan needs: ranks, devices, ports
│   └── UnsoundNodeError     15   a node did not pass its preflight
├── TrainingError             9   a worker failed while training: the cause is in the message
│   ├── LostRankError        12   a rank or its host went away: a signal, a broken connection
│   ├── HungError            13   ranks stood still, or a collective timed out
│   └── BadLossError         14   loss or gradient norm are no number, or the loss leapt beyond supervise.spike_factor
├── DeviceMemoryError        10   a rank ran out of device or host memory
└── CheckFailed              11   a post-run check did not hold (loss fell, resume was exact)

9, 10, 12 and 13, and 15 without the node that it names, are worth another start where the restarts of `supervise.*`
are used up: the last good checkpoint is kept. 14 is as well after a look at the data or the learning rate; the others
repeat until somebody acts.
0 finished, or stopped on request with a checkpoint; 129 hang-up, 130 interrupted (Ctrl-C), 143 terminated: with a
checkpoint as well, unless asked twice.
"""

from __future__ import annotations

from typing import ClassVar


class LauncherError(Exception):
    """A fault that a person can act on: one sentence with key, value, what was expected, what to do."""

    exit_code: ClassVar[int] = 1


class ConfigError(LauncherError, ValueError):
    """A key, a value or a command line that cannot be meant."""

    exit_code = 2


class PlanError(LauncherError, ValueError):
    """No legal or fitting plan; a pinned value is impossible."""

    exit_code = 3


class DataError(LauncherError):
    """Corpus or tokenizer missing, empty, unreadable or too large."""

    exit_code = 4


class RunDirError(LauncherError):
    """A run directory that is missing, occupied, damaged or not writable."""

    exit_code = 5


class CheckpointError(LauncherError):
    """No good checkpoint where one is needed, or it does not belong to this run."""

    exit_code = 6


class EngineError(LauncherError):
    """An engine or an optional package is missing, or refuses what was asked."""

    exit_code = 7


class ClusterError(LauncherError):
    """The machine is not what the plan needs: ranks, devices, ports."""

    exit_code = 8


class UnsoundNodeError(ClusterError):
    """A node did not pass its preflight."""

    exit_code = 15


class TrainingError(LauncherError):
    """A worker failed while training."""

    exit_code = 9


class LostRankError(TrainingError):
    """A rank or its host went away: a signal, a broken connection."""

    exit_code = 12


class HungError(TrainingError):
    """Ranks stood still, or a collective timed out."""

    exit_code = 13


class BadLossError(TrainingError):
    """The loss or the gradient norm is no number, or the loss leapt."""

    exit_code = 14


class DeviceMemoryError(LauncherError):
    """A rank ran out of device or host memory."""

    exit_code = 10


class CheckFailed(LauncherError):
    """A post-run check did not hold."""

    exit_code = 11


FINISHED = 0
HUNG_UP = 129
INTERRUPTED = 130
TERMINATED = 143

BY_EXIT_CODE: dict[int, type[LauncherError]] = {
    cls.exit_code: cls
    for cls in (
        LauncherError,
        ConfigError,
        PlanError,
        DataError,
        RunDirError,
        CheckpointError,
        EngineError,
        ClusterError,
        UnsoundNodeError,
        TrainingError,
        LostRankError,
        HungError,
        BadLossError,
        DeviceMemoryError,
        CheckFailed,
    )
}
