"""What a user sees of the package, stored: command-line runs, the files they leave, commands and exit codes.

`python -m tests.pins.store` writes what is not stored yet to tests/data/pins/. Stored numbers do not change: who finds
one different has changed what the package does.
"""
