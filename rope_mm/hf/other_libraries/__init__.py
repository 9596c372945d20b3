"""Models of diffusers and timm, whose rotary is a table that a class of its own makes."""
