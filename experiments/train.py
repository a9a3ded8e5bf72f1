"""Entry point: the command `lightning-compress`."""

from lightning_compress.lab.app import main

if __name__ == "__main__":
    main()
