"""What files and folders are called: images by their extension, splits by their name."""

from __future__ import annotations

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".npy")
VAL_NAMES = ("val", "validation", "test")  # what holds the split "val", first match
