"""Steps beyond the paper, a file each."""
