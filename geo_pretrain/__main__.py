"""The command `geo-pretrain`, also as `python -m geo_pretrain`, which torchrun needs."""

import sys


def main() -> None:
    """Run the command line; a plain `list` is answered before Typer is loaded."""
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
