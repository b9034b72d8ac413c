"""The command line: argument parsing, readable errors, the run folder."""
