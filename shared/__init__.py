"""Code that both stages use; imports nothing else of this project."""
