"""Save and restore: arrays, position in the data, and the config of a run."""

from moejax.checkpoint.store import Restored, Store, place
from moejax.checkpoint.workdir import open_workdir, read_config

__all__ = ["Restored", "Store", "open_workdir", "place", "read_config"]
