"""What a scheme promises, measured."""
