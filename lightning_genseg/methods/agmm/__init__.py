"""AGMM: learning from points and scribbles."""
