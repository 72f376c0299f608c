"""`echelon plan`: its flags, their units, and the report on a terminal."""
