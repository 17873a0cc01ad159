"""GSS: segmentation as generating the mask's picture."""
