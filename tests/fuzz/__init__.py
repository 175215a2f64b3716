"""Reads mutated files with every reader, and counts what is read, refused and wrong."""
