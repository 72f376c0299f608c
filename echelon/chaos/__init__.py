"""Faults on purpose: what to strike and when, under which streams, what must not differ, and what it cost."""
