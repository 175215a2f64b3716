"""The paper's evaluations."""
