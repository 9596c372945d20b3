"""From segments to positions: where each token stands."""
