"""Public data sets: one file each, its reader and its datamodule."""
