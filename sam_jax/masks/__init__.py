"""Pure functions on masks."""
