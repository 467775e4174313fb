"""Whether the Hugging Face Hub can be reached at all, asked once before its client tries for half a minute.

huggingface_hub repeats every request five times, with pauses of 1 to 8 seconds: right for a busy server or a broken
transfer, not for a machine without a network. Here a file is asked for once, without repeating. Only what no pause
mends counts: a name that is not known, a connection that is refused, finds no way or is never answered.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

from geo_pretrain.errors import first_line

NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ECONNREFUSED, errno.EADDRNOTAVAIL)
UNANSWERED = "ConnectTimeout"  # of the client's HTTP library, whichever it is


def hub_fault(repo: str, file: str, revision: str | None = None, *, cache: str | None = None) -> str | None:
    """Why a file of a repository cannot be asked for; None if somebody answers, or the file is in the cache `cache`.

    Without a word about whether the file is there: that, and a busy server, is the client's work.
    """
    import huggingface_hub as client

    if isinstance(client.try_to_load_from_cache(repo, file, cache_dir=cache, revision=revision), str):
        return None
    try:
        client.get_hf_file_metadata(client.hf_hub_url(repo, file, revision=revision))
    except Exception as error:  # of the client, of its HTTP library, of the system: the reason is in their chain
        for one in _chain(error):
            never = type(one).__name__ == UNANSWERED
            if never or isinstance(one, socket.gaierror) or (isinstance(one, OSError) and one.errno in NO_WAY):
                return f"{first_line(one)}. Check the network and the proxy (HTTPS_PROXY)."
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
