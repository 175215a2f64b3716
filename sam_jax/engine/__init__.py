"""The data engine: a model labels the images that a later model is trained on."""
