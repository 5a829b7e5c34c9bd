"""The pocket world and the pocket model: generated scenes with exact ground truth, and a small model trained on them."""
