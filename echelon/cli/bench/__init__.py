"""`echelon bench`: the options of its commands, and what they need of this machine."""
