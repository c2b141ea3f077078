"""The methods of PEFT 0.21 that have no rule here: what is missing, and what comes closest."""

from collections.abc import Mapping

ABSENT: Mapping[str, str] = {
    "LILY": "its router averages over all tokens of the batch, so what a row gets depends on the other rows, on padding and"
    " on what a cache holds. Closest: VBLORA, of shared vectors",
    "SHADOW": "it trains a second, smaller model beside the base, whose state goes on from block to block; a product of how"
    " far the two are apart is added to what each block reads, so what it does at a site is no function of that site's"
    " input. Closest: LORA",
    "XLORA": "its classifier runs the model once to see its last hidden state, and weighs by it, token by token, LoRA"
    " adapters that lie in other folders: its own spec and file do not say what it changes, and a call is two runs."
    " Closest: LORA adapters, combined by add_weighted_adapter or chosen by adapter_names",
}
