"""`python -m segmenter`: the command line in `segmenter.cli`."""

from segmenter.cli import main

if __name__ == "__main__":
    main()
