"""The networks: pure functions of (variables, arrays)."""
