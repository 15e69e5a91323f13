"""Stage 1: a student learns from a teacher's soft labels alone (SSLD)."""
