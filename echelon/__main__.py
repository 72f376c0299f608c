"""`python -m echelon` is `echelon`.

Runs in the user's terminal; everything is in `echelon/cli`.
"""

from echelon.cli import main

if __name__ == "__main__":
    main()
