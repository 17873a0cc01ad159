"""How strange a pixel is, and thresholds with a promise."""
