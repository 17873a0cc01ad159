"""Pictures and diagrams."""
