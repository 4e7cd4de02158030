"""`sleb.calibration`, under the name that it had in 0.1."""

from sleb.calibration import *  # noqa: F403
