"""What several test folders share. With `tests` on the import path: `from helpers.model_folder import ...`."""
