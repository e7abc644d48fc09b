"""`python -m scaletrain`, so that launchers can start it."""

from scaletrain.cli import main

if __name__ == "__main__":
    main()
