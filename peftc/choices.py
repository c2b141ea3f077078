"""What an argument may be, where both the library and its command say so. The command's help reads it without torch."""

from typing import Literal

# In what form an adapter's files are.
Form = Literal["peft", "serving", "per_expert"]
# Of the numbers in an adapter's files.
Dtype = Literal["float32", "bfloat16", "float16"]
# What of an adapter's files is compared with what they say of themselves, and of their base.
Verify = Literal["all", "files", "nothing"]
# For which runtime a model, or an adapter alone, is written; and what becomes of the adapters in it.
Target = Literal["hf", "pt2", "onnx", "aoti", "gguf", "mlx"]
Adapters = Literal["merged", "inside", "inputs", "beside"]
# Whether a program takes inputs of any sizes, or of those alone that it was made with.
Sizes = Literal["open", "fixed"]
