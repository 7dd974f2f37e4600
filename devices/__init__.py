# Run from the repository root, this folder could be imported a second time as "devices";
# two copies of every class would then exist and isinstance checks fail.
if __name__ != "edgeft.devices":
    raise ImportError("import edgeft.devices instead of devices")
