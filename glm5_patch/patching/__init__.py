"""The patching machine. It knows nothing of GLM-5."""
