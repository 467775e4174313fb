"""`python -m geo_pretrain`, which torchrun needs."""

from geo_pretrain.cli import main

if __name__ == "__main__":
    main()
