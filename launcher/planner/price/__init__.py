"""What a plan costs: bytes of every stage, seconds of one step."""
