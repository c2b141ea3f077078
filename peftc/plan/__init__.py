"""The plan: what will change, computed before anything does. Reads structure only, never a weight."""

from peftc.edits import Conflict, Costs, Edit, Miss, PlannedParam, TrainedTensor
from peftc.plan.applicable import require_applicable, require_same
from peftc.plan.join import without
from peftc.plan.make import make_plan
from peftc.plan.plan import Plan
from peftc.plan.saved import MODULES_TO_SAVE

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
    "require_applicable",
    "require_same",
    "without",
]
