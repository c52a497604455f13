"""`python -m segments`: the command line in `segments.cli`."""

from segments.cli import main

if __name__ == "__main__":
    main()
