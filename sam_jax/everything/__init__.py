"""Everything mode: masks for everything in an image, without prompts from the user."""
