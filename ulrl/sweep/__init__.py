"""From one run to a study: a grid of runs as jobs, done by processes here or by a Ray cluster."""
