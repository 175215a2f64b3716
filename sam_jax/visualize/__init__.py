"""Pictures of masks and plots of data sets."""
