"""A pipeline's stages: built, planned, costed and launched."""
