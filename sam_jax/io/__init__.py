"""Files, local or in an object store."""
