"""ImageNet's statistics, by which pixels are normalised."""

from __future__ import annotations

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation of each channel, for pixels in [0, 1]: every view is normalised with them."""
