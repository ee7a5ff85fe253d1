"""TGI's own routes: /generate and its relatives."""
