"""Image files as RGB arrays, and their resize to the model's input."""
