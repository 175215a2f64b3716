"""Files to variables and back."""
