"""Side-by-side measurements against other implementations; `python -m perf.<name> --help`."""
