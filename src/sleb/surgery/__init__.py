"""Cutting blocks out of files, proving the cut, and taking it back."""
