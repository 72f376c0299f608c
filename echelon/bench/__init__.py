"""`echelon bench`: what is asked of a cluster, and what is made of its times. Imports nothing of the server."""
