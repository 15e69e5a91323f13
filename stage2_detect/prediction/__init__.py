"""Detection on images and videos without annotations."""
