"""`sleb.checkpoints.checkpoint`, under the name that it had in 0.1."""

from sleb.checkpoints.checkpoint import *  # noqa: F403
