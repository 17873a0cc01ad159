"""Segmentation after a few examples: CGMGM, BAM, prototypes."""
