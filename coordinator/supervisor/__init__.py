"""The process of `echelon serve` itself: it checks, starts Ray, and starts and replaces coordinators."""
