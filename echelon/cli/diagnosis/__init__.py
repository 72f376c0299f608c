"""What `echelon doctor` looks at and what it makes of it: facts gathered at the edge, checks that judge them."""
