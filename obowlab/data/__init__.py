"""Images in: prepared data sets, views, loaders."""
