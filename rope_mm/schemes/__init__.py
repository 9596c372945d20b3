"""By how much each pair of channels rotates: frequencies, extensions and every scheme the field ships."""
