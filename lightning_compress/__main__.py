"""`python -m lightning_compress`: the command line."""

from lightning_compress.lab.app import main

if __name__ == "__main__":
    main()
