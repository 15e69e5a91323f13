"""Soft labels, losses, the student, and the check of the teacher."""
