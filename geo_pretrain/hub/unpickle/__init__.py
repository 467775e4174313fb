"""The child process that reads somebody else's pickled file and writes the tensors of one entry as safetensors.

Run by `hub.extract` as `python -I <this folder>` with a JSON job on standard input; standalone: standard library, and
numpy for strided tensors. Python's own unpickler is not used: `pickletools` decodes the instructions, and `machine`,
which steps through them, can build nothing but containers, numbers, texts and the inert `nodes`. No instruction
imports, calls or sets an attribute. What a file may name, and what it may ask to call, is decided by the lists of what
is allowed in `names`; what is on them without a stand-in becomes a placeholder (`Foreign`), for anything else the file
is refused. Classes of packages that no list knows are placeholders too, but only as types of plain objects. Values are
looked at lazily and never walked, compared or hashed as a whole: depth, sharing and cycles cost nothing. What is
written has at most `tensors.UNFOLDED` times the bytes of the file.

`__main__` -> `job` (limits, the second wall, the report) -> `tensors` (what is wanted, safetensors) -> `formats` (torch
>= 1.6, a zip; torch < 1.6, "legacy"; plain pickles of numpy arrays) -> `machine` -> `stand_ins` (for calls) -> `nodes`,
`budget` -> `names` (what a file may name). Layouts as written by torch/serialization.py and numpy's `__reduce__`.

Nothing but this text may stand here: the child does not run this file, see `__main__`.
"""
