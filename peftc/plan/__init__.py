"""The plan: what will change, computed before anything does. Reads structure only, never a weight."""

from peftc.plan.join import without
from peftc.plan.make import make_plan, require_same
from peftc.plan.plan import MODULES_TO_SAVE, Conflict, Costs, Edit, Miss, Plan, PlannedParam, TrainedTensor

__all__ = [
    "MODULES_TO_SAVE",
    "Conflict",
    "Costs",
    "Edit",
    "Miss",
    "Plan",
    "PlannedParam",
    "TrainedTensor",
    "make_plan",
    "require_same",
    "without",
]
