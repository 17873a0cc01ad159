"""``python -m lightning_genseg`` is the command ``genseg``."""

from lightning_genseg.cli.main import main

if __name__ == "__main__":
    main()
