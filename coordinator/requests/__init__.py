"""Requests' lives, from submit to forgotten: the sans-IO core, its events, and who takes a request next."""
