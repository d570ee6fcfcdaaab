"""Galleries of visual words: their best patches in a data set, drawn on sheets and a page."""
