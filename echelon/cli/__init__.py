"""The `echelon` command: every verb over the SDK, and `serve`, loaded only when it is named.

The process edge: here errors become one line and an exit code. 0 ok, 1 failed, 2 wrong use or input, 3 some items of
a job failed, 130 Ctrl-C.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from echelon.cli.app import app

        app(prog_name="echelon")
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"echelon: error: the command needs {error.name}: pip install 'echelon[cli]'")
    except KeyboardInterrupt:  # before a command began; within one, app.py turns it into the same
        sys.exit(130)
