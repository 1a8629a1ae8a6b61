"""The `specdec` command: each file parses, calls one function of the package and prints."""
