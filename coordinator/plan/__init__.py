"""The planner: what a layout of a model over devices holds, how fast it can be, and which layout to take."""
