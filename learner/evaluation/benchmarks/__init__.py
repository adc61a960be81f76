"""Text-to-image benchmarks: prompts from their own files, images in their own layouts."""
