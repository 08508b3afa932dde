"""Attention maps kept and found again: the database, its mapping into memory, the embedding and the search."""
