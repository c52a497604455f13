"""`python -m mae.segments` is `python -m mae masks`."""

import sys

from mae.cli import main

if __name__ == "__main__":
    main(["masks", *sys.argv[1:]])
