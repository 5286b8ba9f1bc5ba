"""What a reader of the paper may skip."""
