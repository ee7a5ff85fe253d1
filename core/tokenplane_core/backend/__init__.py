"""The contract between the core and a backend plugin: all that the author of a plugin reads."""
