"""`sleb.calibration.sources`, under the name that it had in 0.1."""

from sleb.calibration.sources import *  # noqa: F403
