"""The chaos table: what must hold when machines fail and files are hostile."""
