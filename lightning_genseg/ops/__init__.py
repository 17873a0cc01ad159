"""Tensors in, tensors out: sizes, squares, views. Knows no room above."""
