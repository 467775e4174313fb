"""The command `geo-pretrain`, also as `python -m geo_pretrain`, which torchrun needs."""

import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command line; a plain `list` is answered before Typer is loaded.

    What a console cannot show (Windows' code pages lack most signs) is replaced, and is no error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")
    if sys.argv[1:2] == ["list"]:
        from geo_pretrain.listing import answer

        text = answer(sys.argv[2:])
        if text is not None:
            sys.stdout.write(text + "\n")
            return
    from geo_pretrain.cli import main as run

    run()


if __name__ == "__main__":
    main()
