"""`python -m mae`: the command line in `mae.cli`."""

from mae.cli import main

if __name__ == "__main__":
    main()
