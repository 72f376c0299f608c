"""`echelon experts`: how evenly a model's experts are used, as numbers, in the terminal and as a picture."""
