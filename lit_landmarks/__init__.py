"""Anatomical landmarks by heatmap regression."""
