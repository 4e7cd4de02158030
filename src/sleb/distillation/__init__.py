"""Recovery distillation, the optional stage after a cut."""

from sleb.distillation.distill import heal
from sleb.distillation.record import Healed

__all__ = ["Healed", "heal"]
