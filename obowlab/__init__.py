"""obowlab: self-supervised learning by predicting online bags of visual words (Gidaris et al., CVPR 2021)."""

__version__ = "0.1.0"
