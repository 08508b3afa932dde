"""``python -m effref``."""

from .main import main

main()
