"""Bundles: a model with everything it needs to answer on a device without a network.

A bundle is a folder:

    bundle.json        what is in it: every file with its size and SHA-256, model, target, lineage, licence
    bundle.json.sig    optional: an ed25519 signature of bundle.json
    model/ adapters/   the artifact and its adapters, each with its manifest
    wheels/            runtime and edgeft itself, for the device's Python and processor
    install.sh         installs without network and without root; also uninstalls
    systemd/ LICENSES/ sbom.cdx.json cascade.toml README.txt

Files are named by digest once installed, so that an update moves only what changed.
"""
