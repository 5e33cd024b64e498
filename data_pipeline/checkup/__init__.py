"""What the data doctor looks for: in a picture, in a source, in a converted set, and between their clips."""
