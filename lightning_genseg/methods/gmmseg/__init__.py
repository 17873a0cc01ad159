"""GMMSeg: a Gaussian mixture for each class."""
