"""What sets two artifacts apart: metadata, template, tensor types, tensors, and what they answer."""
