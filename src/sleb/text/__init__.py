"""`sleb.calibration`, under the name that it had in 0.1."""

from sleb.calibration import *  # noqa: F403
from sleb.calibration.windows import DEFAULT_WINDOWS, Windows, load_windows  # noqa: F401
