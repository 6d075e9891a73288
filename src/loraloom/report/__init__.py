"""Figures in, pictures and pages out."""
