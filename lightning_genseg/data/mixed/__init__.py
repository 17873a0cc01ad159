"""Several data sets in the classes of one table."""
