"""Batch jobs: input, the sans-IO runner, the store, and the shell that answers the items like any client's requests."""
