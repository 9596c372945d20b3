"""How fast each pair of channels turns: frequencies, extensions and every scheme the field ships."""
