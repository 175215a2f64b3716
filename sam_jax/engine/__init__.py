"""The data engine: a model that labels what it may later learn from."""
