"""edgeft: from a data set to a small language model that answers offline."""

__version__ = "0.1.0"
