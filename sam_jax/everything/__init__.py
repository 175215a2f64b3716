"""Finds masks of everything in an image, without prompts from the user."""
