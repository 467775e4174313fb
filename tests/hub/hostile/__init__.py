"""A corpus of hostile files for the extraction of authors' checkpoints, put together instruction by instruction.

`CORPUS` maps a name to an `Attack`: what builds the file, which error it has to end in, and a part of its message.
Attacks marked `fires` touch a canary file when Python's own unpickler reads them; a test proves that they would.
Everything else is a bomb, a lie about sizes, or a file that means two things.
"""

from tests.hub.hostile import archives, pickles
from tests.hub.hostile.assembler import *  # noqa: F403
from tests.hub.hostile.corpus import CORPUS, Attack, attack, lie, python, system

__all__ = ["CORPUS", "Attack", "archives", "attack", "lie", "pickles", "python", "system"]
