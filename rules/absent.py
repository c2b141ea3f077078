"""The methods of PEFT 0.21 that have no rule here: what is missing, and what comes closest."""

from collections.abc import Mapping

ABSENT: Mapping[str, str] = {
    "LILY": "its router averages over the batch, so it is no function of a row. Closest: VBLORA, of shared vectors",
    "SHADOW": "it trains a second, smaller decoder beside the model, whose hidden state goes on from block to block and is"
    " added to what they read, so what it does at a site is no function of that site's input. Closest: LORA",
    "XLORA": "it runs the model twice, and the first run chooses among the adapters. Closest: LORA adapters,"
    " combined by add_weighted_adapter or chosen by adapter_names",
}
