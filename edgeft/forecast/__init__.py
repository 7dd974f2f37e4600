"""What a model will need and do on a device, before it is downloaded or exported."""
