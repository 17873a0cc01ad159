"""Labels of few pixels."""
