"""What is read and written: CSVs of images, indices folders, vocabularies."""
