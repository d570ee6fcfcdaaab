"""The report: the run store as a static site. `gather` reads, `figures` draws, `build` writes; `site` is what lies between."""
