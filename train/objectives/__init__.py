"""Objectives: the functions whose values runs minimise."""
