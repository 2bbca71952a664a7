"""What a run says about itself: logs, metrics, progress, memory. Nothing is imported here, to stay cheap."""
