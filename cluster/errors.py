"""Errors that a user can act on. `main` functions print them without a traceback."""


class TesseraError(Exception):
    """Base of every error whose message says what failed, where, and what to do."""


class ConfigError(TesseraError, ValueError):
    """A configuration value is unknown, malformed or impossible."""


class CheckpointError(TesseraError):
    """A file of tensors, a snapshot or a checkpoint is missing, damaged or of another model."""


class FleetError(TesseraError):
    """A role of the fleet failed, or did not answer in time."""


class LearnerLostError(FleetError):
    """The learner is gone, with what it learned since the last checkpoint."""


class InputLostError(FleetError):
    """A worker is well, but what it was to work on went with another worker, or its machine."""


class DataError(TesseraError):
    """Images, conditions or scores are not what they should be."""


class LearningError(TesseraError):
    """A learning step came to numbers that are not finite; the weights are those before it."""


class StorageError(TesseraError):
    """A file could not be written: the disk is full, a limit is reached, or it went away."""
