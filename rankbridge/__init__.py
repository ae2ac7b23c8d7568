"""The operator's desk: command line, supervisor, rehearsal, preflight."""
