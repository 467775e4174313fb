"""The child process that reads somebody else's pickled file and writes the tensors of one entry as safetensors.

Run by `hub.extract` as `python -I <this folder>` with a JSON job on standard input; standalone: standard library, and
numpy for strided tensors. Python's own unpickler is not used. `machine` steps through the instructions itself and can
build nothing but containers, numbers, texts and the inert nodes of `stand_ins`: there is no instruction here that
imports, calls or sets an attribute, so a file that asks for it gets a `Foreign` node or is refused, and never what it
asked for. Values are looked at lazily and never walked, compared or hashed as a whole: depth, sharing and cycles cost
nothing.

`__main__` -> `job` (limits, the second wall, the report) -> `tensors` (what is wanted, safetensors) -> `formats` (torch
>= 1.6, a zip; torch < 1.6, "legacy"; plain pickles of numpy arrays) -> `machine` -> `stand_ins` -> `names` (what a file
may name). Layouts as written by torch/serialization.py, numpy's `__reduce__` and the opcodes of pickletools.

Nothing but this text may stand here: the child does not run this file, see `__main__`.
"""
