"""Ends of a run that are nobody's unusable input: exit code 1, and no new start, which would meet them again (as it
would not meet `qwenimg_dist.patience.StorageAwayError`, after which the gang starts anew)."""


class TrainingError(RuntimeError):
    """The run cannot go on by itself; the message says what happened and where. Raised on every rank alike."""


class DegradedError(TrainingError):
    """The guard stopped the run, which is saved: the model had become worse than the one it started from."""
