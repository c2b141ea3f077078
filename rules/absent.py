"""The methods of PEFT 0.21 that have no rule here: what is missing, and what comes closest."""

from collections.abc import Mapping

ABSENT: Mapping[str, str] = {
    "ADAMSS": "it clusters the singular vectors of a weight into subspaces with a budget for each. Closest: PSOFT, of one"
    " subspace, or ADALORA, which has a budget",
    "FROD": "its bases come out of all the weights of one kind together. Closest: VERA, whose bases are random",
    "LILY": "its router averages over the batch, so it is no function of a row. Closest: VBLORA, of shared vectors",
    "SHADOW": "it trains a small network beside the model, whose state every block changes. Closest: LORA",
    "XLORA": "it runs the model twice, and the first run chooses among the adapters. Closest: LORA adapters,"
    " combined by add_weighted_adapter or chosen by adapter_names",
}
