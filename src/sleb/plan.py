"""`sleb.core.plan`, under the name that it had in 0.1."""

from sleb.core.plan import *  # noqa: F403
