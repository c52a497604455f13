"""What benchmark.py stands on. It starts mae and segmenter as programs and imports neither."""
