"""Networks by reference, their files, teachers, folded BatchNorm."""
