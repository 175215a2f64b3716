"""Masks drawn over images, plots of data sets, and the style of all plots."""
