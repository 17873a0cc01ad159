"""Tokenizers of maskiges."""
