"""Recovery distillation, the optional stage after a cut."""

from sleb.distillation.distill import heal as heal
from sleb.distillation.record import Healed as Healed
