"""Sources of the site, and the programs that generate parts of it."""
