"""``python -m piste`` is the command ``piste``."""

from piste.cli import main

if __name__ == "__main__":
    main()
