"""Predicts masks from prompts: numpy in, numpy out."""
