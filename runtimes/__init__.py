# Run from the repository root, this folder could be imported a second time as "runtimes";
# two copies of every class would then exist and isinstance checks fail.
if __name__ != "edgeft.runtimes":
    raise ImportError("import edgeft.runtimes instead of runtimes")
