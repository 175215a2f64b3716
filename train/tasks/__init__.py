"""The tasks that runs learn, one a file."""
