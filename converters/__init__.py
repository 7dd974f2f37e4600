# Run from the repository root, this folder could be imported a second time as "converters";
# two copies of every class would then exist and isinstance checks fail.
if __name__ != "edgeft.converters":
    raise ImportError("import edgeft.converters instead of converters")
