"""Files and folders: replaced as a whole or not at all, read header first."""
