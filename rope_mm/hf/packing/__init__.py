"""Examples of text, images and videos packed into rows, and the check that they do not see each other."""
