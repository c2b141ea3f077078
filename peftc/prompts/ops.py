"""The row of the table of ops for a model's call, and what a host of one needs."""

from peftc.graph.ops import Op
from peftc.prompts.calls import CallSite
from peftc.prompts.find import find
from peftc.prompts.generation import call_methods
from peftc.prompts.splice import splice_call, splice_inputs

OPS = (
    Op(
        "call",
        find=find,
        splice=splice_call,
        splice_inputs=splice_inputs,
        methods=call_methods,
        site=CallSite,
        unmixable="a prompt method changes the length of every row",
    ),
)
