"""`edgeft tui`: everything edgeft does, on one screen.

The screen starts commands and shows what they write; it computes nothing itself. So every action has its command line,
long work runs as a job that outlives the screen, and a model answers from a process of its own.
"""
