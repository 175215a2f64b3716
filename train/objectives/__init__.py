"""Objectives: the functions whose values runs minimize."""
