"""From stored images to the views that a step sees: boxes, pixels, colours, loaders."""
