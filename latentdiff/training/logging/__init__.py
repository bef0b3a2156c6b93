"""What a run says of itself: metrics, log.jsonl, trackers, loss.png and report.html."""
